"""What S3 offers beyond a filesystem: reading one version, the conditional put, and errors that say what to do.

A call is one attempt and raises `StorageError`, whose `transient` and `code` say what can be done about it;
`medvision_ray.storage` and `medvision_ray.listing` are the doors that other rooms use, with retries. What takes
several requests (`list_pages`, `exists_s3`, `delete_below_s3`) retries each of them here.

An object's bytes are checked against its length and, where the store sends one, against its CRC (boto3 does; S3
keeps one for every object that a client of 2025 or later has put). The ETag is not taken for an MD5: under SSE-KMS,
in multipart uploads and in several other stores it is none.
"""

from __future__ import annotations

import os
import time
from collections.abc import Iterator
from contextlib import closing, contextmanager
from datetime import datetime
from functools import lru_cache, partial
from typing import Any

from medvision_ray.errors import CredentialsError, StorageError, UsageError
from medvision_ray.retry import retrying

_CONNECT_SECONDS = 5.0
_SILENCE_SECONDS = 20.0  # without a byte
_READ_SECONDS = 60.0  # for one object, and what its size takes at the slowest rate:
_SLOWEST_BYTES_PER_SECOND = 256 << 10
_CHUNK_BYTES = 256 << 10

_CREDENTIALS = frozenset(
    {
        "ExpiredToken",
        "ExpiredTokenException",
        "InvalidAccessKeyId",
        "InvalidClientTokenId",
        "InvalidToken",
        "MissingAuthenticationToken",
        "MissingSecurityHeader",
        "RequestExpired",
        "RequestTimeTooSkewed",
        "SignatureDoesNotMatch",
        "TokenRefreshRequired",
        "UnrecognizedClientException",
    }
)
# With whatever status; S3 says 400 for some. What is 409, 429 or 5xx is transient whatever its name.
_TRANSIENT = frozenset(
    {
        "BadDigest",
        "BandwidthLimitExceeded",
        "IncompleteBody",
        "InternalError",
        "RequestLimitExceeded",
        "RequestTimeout",
        "RequestTimeoutException",
        "ServiceUnavailable",
        "SlowDown",
        "Throttling",
        "ThrottlingException",
        "TooManyRequestsException",
        "XAmzContentSHA256Mismatch",
    }
)


@lru_cache(maxsize=4)
def _s3_client(endpoint: str) -> Any:
    from boto3.session import Session
    from botocore.config import Config

    config = Config(
        retries={"total_max_attempts": 1, "mode": "standard"},  # `medvision_ray.retry` is the layer
        connect_timeout=_CONNECT_SECONDS,
        read_timeout=_SILENCE_SECONDS,
        max_pool_connections=32,
        tcp_keepalive=True,
    )
    # A session of its own: clients made from boto3's default session by two threads at once can fail (boto/boto3#1592).
    return Session().client("s3", endpoint_url=endpoint or None, config=config)


def s3_client() -> Any:
    """A boto3 S3 client for the current endpoint, one a process until its credentials are refused."""
    try:
        return _s3_client(os.environ.get("AWS_ENDPOINT_URL", ""))
    except ValueError:
        raise UsageError("Expected AWS_ENDPOINT_URL as http://HOST:PORT or https://HOST.") from None


def bucket_key(uri: str) -> tuple[str, str]:
    """The bucket and the key or prefix of an s3:// address."""
    # Not urlsplit: `?` and `#` are ordinary characters of a key.
    bucket, _, key = uri.split("://", 1)[1].partition("/")
    return bucket, key


def list_pages(bucket: str, prefix: str, **narrower: Any) -> Iterator[dict[str, Any]]:
    """The pages of a listing as S3 answers them, each retried by itself.

    Args:
        narrower: more of the request, such as `MaxKeys`.
    """
    place = f"s3://{bucket}/{prefix}"

    def ask(request: dict[str, Any]) -> dict[str, Any]:
        with _asking(place):
            answer: dict[str, Any] = s3_client().list_objects_v2(Bucket=bucket, Prefix=prefix, **request)
        return answer

    request = narrower
    while True:
        page = retrying(partial(ask, request), place)
        yield page
        if not page.get("IsTruncated"):
            return
        request = {**narrower, "ContinuationToken": page["NextContinuationToken"]}


def stat_s3(uri: str) -> tuple[int, str, datetime]:
    """Size, etag and time of the last change of one object."""
    bucket, key = bucket_key(uri)
    with _asking(uri):
        answer = s3_client().head_object(Bucket=bucket, Key=key)
        return answer["ContentLength"], answer["ETag"].strip('"'), answer["LastModified"]


def exists_s3(uri: str) -> bool:
    """Whether there is an object of this key, or one below it; with a slash at the end only the latter counts."""
    bucket, key = bucket_key(uri)
    try:
        if key and not key.endswith("/"):
            retrying(lambda: stat_s3(uri), uri)
            return True
    except StorageError as error:
        if error.code != "not_found":
            raise
    prefix = f"{key.rstrip('/')}/" if key else ""
    try:
        page = next(list_pages(bucket, prefix, MaxKeys=1))
    except StorageError as error:
        if error.code != "not_found":  # no such bucket
            raise
        return False
    return not prefix or bool(page.get("Contents"))


def read_s3(uri: str, max_bytes: int | None, etag: str | None) -> bytes:
    """One object whole, of the version `etag` where given."""
    bucket, key = bucket_key(uri)
    condition = {"IfMatch": f'"{etag}"'} if etag else {}
    with _asking(uri):
        answer = s3_client().get_object(Bucket=bucket, Key=key, **condition)
        with closing(answer["Body"]) as body:
            length = answer.get("ContentLength")
            if max_bytes is not None and length is not None and length > max_bytes:
                raise StorageError("The object is over the size limit.", code="too_large")
            if etag and answer.get("ETag", "").strip('"') != etag:  # a store that knows no If-Match
                raise StorageError("The object changed since it was listed.", code="changed_while_reading")
            return _whole(body, length, uri)


def read_range_s3(uri: str, wanted: str, etag: str | None) -> tuple[bytes, int, str]:
    """A part of one object, then the size of the whole and its etag.

    Args:
        wanted: `FIRST-LAST` or `-COUNT` for the last bytes (RFC 9110, 14.1.2).
    """
    bucket, key = bucket_key(uri)
    condition = {"IfMatch": f'"{etag}"'} if etag else {}
    try:
        with _asking(uri):
            answer = s3_client().get_object(Bucket=bucket, Key=key, Range=f"bytes={wanted}", **condition)
            with closing(answer["Body"]) as body:
                data = _whole(body, answer.get("ContentLength"), uri)
    except StorageError as error:
        if error.code == "out_of_range":
            return b"", 0, ""
        raise
    size = answer.get("ContentRange", "").rpartition("/")[2]
    return data, int(size) if size.isdigit() else len(data), answer["ETag"].strip('"')


def _whole(body: Any, length: int | None, uri: str) -> bytes:
    """The bytes of a body, which must be as many as announced and come in bearable time."""
    deadline = time.monotonic() + _READ_SECONDS + (length or 0) / _SLOWEST_BYTES_PER_SECOND
    chunks: list[bytes] = []
    come = 0
    while chunk := body.read(_CHUNK_BYTES):
        chunks.append(chunk)
        come += len(chunk)
        if come != length and time.monotonic() > deadline:
            raise StorageError(f"{uri} came slower than is bearable.", transient=True)
    data = b"".join(chunks)
    if come != length:
        raise StorageError(f"Expected {length} bytes of {uri}, but {come} came.", transient=True)
    return data


def put_s3(uri: str, data: bytes, **condition: str) -> None:
    """Write one object; `IfNoneMatch="*"` only where there is none (else code `changed_while_reading`)."""
    bucket, key = bucket_key(uri)
    with _asking(uri):
        s3_client().put_object(Bucket=bucket, Key=key, Body=data, **condition)


def copy_s3(source: str, target: str) -> None:
    """Copy one object inside the store."""
    (from_bucket, from_key), (bucket, key) = bucket_key(source), bucket_key(target)
    with _asking(target):
        s3_client().copy_object(Bucket=bucket, Key=key, CopySource={"Bucket": from_bucket, "Key": from_key})


def delete_s3(uri: str) -> None:
    """Delete one object; nothing there is fine."""
    bucket, key = bucket_key(uri)
    with _asking(uri):
        s3_client().delete_object(Bucket=bucket, Key=key)


def delete_below_s3(uri: str) -> None:
    """Delete every object below a prefix, a page of the listing at a time."""
    bucket, key = bucket_key(uri)
    for page in list_pages(bucket, f"{key}/" if key else ""):
        if page.get("Contents"):
            retrying(partial(_delete_page, bucket, [item["Key"] for item in page["Contents"]], uri), uri)


def _delete_page(bucket: str, keys: list[str], uri: str) -> None:
    with _asking(uri):
        request = {"Objects": [{"Key": key} for key in keys], "Quiet": True}
        refused = s3_client().delete_objects(Bucket=bucket, Delete=request).get("Errors", ())
    for item in refused:  # an answer of 200 can hold errors key by key
        raise meaning_of(str(item.get("Code", "")), 0, uri)


@contextmanager
def _asking(uri: str) -> Iterator[None]:
    """Turn what boto3 raises inside the block into a StorageError."""
    try:
        yield
    except StorageError:
        raise
    except Exception as error:
        raise s3_error(error, uri) from None


def s3_error(error: Exception, uri: str) -> StorageError:
    """What an error of boto3 means here; its text is dropped. An error that is none of the store's is raised."""
    from botocore import exceptions as boto
    from botocore.parsers import ResponseParserError
    from urllib3.exceptions import HTTPError

    if isinstance(error, boto.ClientError):
        answer = error.response.get("ResponseMetadata", {})
        code, status = str(error.response.get("Error", {}).get("Code", "")), answer.get("HTTPStatusCode", 0)
        if error.operation_name == "HeadObject" and status in (400, 403):
            code = _reason_behind_head(uri) or code
        return meaning_of(code, status, uri, _seconds(answer.get("HTTPHeaders", {}).get("retry-after", "")))
    lacking = (
        boto.NoCredentialsError,
        boto.PartialCredentialsError,
        boto.CredentialRetrievalError,
        boto.MetadataRetrievalError,
        boto.TokenRetrievalError,
        boto.SSOError,
        boto.ProfileNotFound,
        boto.ConfigParseError,
    )
    if isinstance(error, lacking):
        return meaning_of("InvalidToken", 0, uri)
    broken = (boto.HTTPClientError, boto.ConnectionError, boto.IncompleteReadError, boto.FlexibleChecksumError)
    if isinstance(error, (*broken, ResponseParserError, HTTPError, OSError)):
        return StorageError(f"{uri} could not be read or written: the connection failed.", transient=True)
    if isinstance(error, boto.BotoCoreError):
        return StorageError(f"{uri} could not be read or written: the request cannot be made.")
    raise error


def meaning_of(code: str, status: int, uri: str, retry_after: float = 0.0) -> StorageError:
    """The StorageError for an error code and an HTTP status of S3."""
    if code in ("NoSuchKey", "NoSuchBucket", "NoSuchVersion", "404"):
        return StorageError(f"Expected an object at {uri}, but there is none.", code="not_found")
    if code == "InvalidRange":
        return StorageError(f"Expected more bytes in {uri} than there are.", code="out_of_range")
    if code in ("PreconditionFailed", "412"):
        return StorageError("The object changed since it was listed.", code="changed_while_reading")
    if code in _CREDENTIALS:
        _s3_client.cache_clear()  # the next client reads its credentials anew
        return CredentialsError(
            f"The store does not accept this process's credentials ({code}; {uri}). Renew them (or set the clock), "
            "then give the same command again.",
            code="credentials",
        )
    if code in _TRANSIENT or status in (409, 429) or status >= 500:
        text = f"The store could not answer for {uri} at the moment."
        return StorageError(text, transient=True, retry_after=retry_after)
    if status in (401, 403) or code == "AccessDenied":
        return StorageError(f"The store refused access to {uri}; check its policy.", code="access_denied")
    return StorageError(f"{uri} could not be read or written: the store refused the request.")


def _seconds(header: str) -> float:
    return float(header) if header.isdigit() else 0.0  # S3 sends seconds; a date is not worth a parser


def _reason_behind_head(uri: str) -> str:
    """The error code that a refused HEAD had no body for: the same question as GET."""
    from botocore.exceptions import BotoCoreError, ClientError

    bucket, key = bucket_key(uri)
    try:
        s3_client().get_object(Bucket=bucket, Key=key)["Body"].close()
    except ClientError as error:
        return str(error.response.get("Error", {}).get("Code", ""))
    except BotoCoreError:
        pass
    return ""
