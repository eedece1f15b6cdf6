"""What S3 offers beyond a filesystem: listing with etags, reading one version, the conditional put.

Each call raises `StorageError`; `medvision_ray.storage` is the door that other rooms use.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from functools import lru_cache
from typing import Any

from medvision_ray.errors import StorageError

ATTEMPTS = 5
"""How often a call that may pass is tried."""


@lru_cache(maxsize=4)
def _s3_client(endpoint: str) -> Any:
    from boto3.session import Session
    from botocore.config import Config

    config = Config(retries={"max_attempts": ATTEMPTS, "mode": "standard"}, max_pool_connections=32)
    # A session of its own: clients made from boto3's default session by two threads at once can fail (boto/boto3#1592).
    return Session().client("s3", endpoint_url=endpoint or None, config=config)


def s3_client() -> Any:
    """A boto3 S3 client for the current endpoint, one a process."""
    return _s3_client(os.environ.get("AWS_ENDPOINT_URL", ""))


def bucket_key(uri: str) -> tuple[str, str]:
    """The bucket and the key or prefix of an s3:// address."""
    # Not urlsplit: `?` and `#` are ordinary characters of a key.
    bucket, _, key = uri.split("://", 1)[1].partition("/")
    return bucket, key


def list_s3(bucket: str, prefix: str) -> Iterator[dict[str, Any]]:
    """Every entry (`Key`, `Size`, `ETag`) below a prefix in key order."""
    paginator = s3_client().get_paginator("list_objects_v2")
    try:
        for page in paginator.paginate(Bucket=bucket, Prefix=prefix):
            yield from page.get("Contents", ())
    except Exception as error:
        raise s3_error(error, f"s3://{bucket}/{prefix}") from None


def read_s3(uri: str, max_bytes: int | None, etag: str | None) -> bytes:
    """One object whole, of the version `etag` where given."""
    bucket, key = bucket_key(uri)
    condition = {"IfMatch": f'"{etag}"'} if etag else {}
    try:
        answer = s3_client().get_object(Bucket=bucket, Key=key, **condition)
        if max_bytes is not None and answer["ContentLength"] > max_bytes:
            answer["Body"].close()
            raise StorageError("The object is over the size limit.", code="too_large")
        data: bytes = answer["Body"].read()
    except StorageError:
        raise
    except Exception as error:
        raise s3_error(error, uri) from None
    return data


def put_s3(uri: str, data: bytes, **condition: str) -> None:
    """Write one object; `IfNoneMatch="*"` only where there is none (else code `changed_while_reading`)."""
    bucket, key = bucket_key(uri)
    try:
        s3_client().put_object(Bucket=bucket, Key=key, Body=data, **condition)
    except Exception as error:
        raise s3_error(error, uri) from None


def s3_error(error: Exception, uri: str) -> StorageError:
    """What an error of boto3 means here; its text is dropped."""
    from botocore.exceptions import NoCredentialsError, ParamValidationError, PartialCredentialsError

    if isinstance(error, NoCredentialsError | PartialCredentialsError):
        return StorageError(f"Expected AWS credentials for {uri}, but found none.", code="access_denied")
    answer = getattr(error, "response", {})
    code = str(answer.get("Error", {}).get("Code", ""))
    status = answer.get("ResponseMetadata", {}).get("HTTPStatusCode", 0)
    if code in ("NoSuchKey", "NoSuchBucket", "404"):
        return StorageError(f"Expected an object at {uri}, but there is none.", code="not_found")
    if code in ("PreconditionFailed", "412"):
        return StorageError("The object changed since it was listed.", code="changed_while_reading")
    if status in (401, 403):
        return StorageError(f"The store refused access to {uri}; check credentials and policy.", code="access_denied")
    # 0: no answer came, unless the request was never sent; 409: a conditional put met a concurrent delete.
    transient = not isinstance(error, ParamValidationError) and (status in (0, 409, 429) or status >= 500)
    return StorageError(f"{uri} could not be read or written.", transient=transient)
