"""The one family of exceptions that medvision_ray raises on purpose.

A message of this family says what was expected, what came, where, and what to do. It never
quotes another exception's text, which can hold a patient's name (pydicom's do).
"""

from __future__ import annotations


class MedVisionError(Exception):
    """Base of every error that this package raises on purpose; exit code 1 on the command line."""


class UsageError(MedVisionError):
    """The command line or a configuration is wrong; exit code 2."""


class ConfigError(UsageError):
    """A configuration file or override was refused.

    Attributes:
        problems: option and what it should be, for each refused option; never the refused value.
    """

    def __init__(self, message: str, problems: tuple[tuple[str, str], ...] = ()) -> None:
        super().__init__(message)
        self.problems = problems


class StorageError(MedVisionError):
    """An object could not be listed, read or written.

    Attributes:
        transient: whether a later try may help.
        code: `read_error`, `not_found`, `access_denied`, `too_large`, `changed_while_reading`, or `credentials`:
            the store accepts none of this process's requests until its credentials are renewed.
        retry_after: seconds that the store asked to be left alone.
    """

    def __init__(
        self, message: str, *, transient: bool = False, code: str = "read_error", retry_after: float = 0.0
    ) -> None:
        super().__init__(message)
        self.transient = transient
        self.code = code
        self.retry_after = retry_after


class CredentialsError(StorageError):
    """The store accepts none of a worker's requests: the run stops, in place of a failure row for each object."""


class LabelError(UsageError):
    """A label table is unusable, or its splits leak patients or images."""


class BundleError(MedVisionError):
    """A bundle is incomplete, altered or of an unknown version."""
