"""Which IAM actions the requests are that a loopback S3 is sent, and whether policies allow them."""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from fnmatch import fnmatchcase
from html import unescape
from io import BytesIO
from pathlib import Path
from typing import Any
from unittest import mock
from urllib.parse import parse_qs, unquote, urlsplit

from werkzeug.serving import WSGIRequestHandler

POLICIES = Path(__file__).resolve().parents[2] / "deploy/aws"
OUTPUT_PREFIX = "medvision"
"""Below it lies the output in the policies."""


@dataclass(frozen=True)
class Asked:
    """One action on one resource.

    Attributes:
        action: such as `s3:GetObject`.
        resource: its ARN.
    """

    action: str
    resource: str


def asked_by(method: str, target: str, copied_from: str | None = None, body: str = "") -> list[Asked]:
    """What a request needs to be allowed (Service Authorization Reference, Amazon S3); nothing of a server's own paths.

    A HEAD or GET of an absent key answers 404 only to who may list; every policy here lets who reads list.

    Args:
        target: path and query.
        copied_from: the header `x-amz-copy-source`.
        body: of a deletion of many objects.

    Raises:
        AssertionError: a request of a kind that is not known here.
    """
    parts = urlsplit(target)
    bucket, _, key = unquote(parts.path).lstrip("/").partition("/")
    query = parse_qs(parts.query, keep_blank_values=True)
    if not bucket or bucket == "moto-api":
        return []
    whole, one = f"arn:aws:s3:::{bucket}", f"arn:aws:s3:::{bucket}/{key}"
    if not key:
        if method == "GET" and ("list-type" in query or "prefix" in query):
            return [Asked("s3:ListBucket", whole)]
        if method == "POST" and "delete" in query:
            keys = re.findall("<Key>(.*?)</Key>", body, re.DOTALL)
            return [Asked("s3:DeleteObject", f"{whole}/{unescape(name)}") for name in keys]
        raise AssertionError(f"Expected a known request of a bucket, but got {method} {parts.query}.")
    if method in ("GET", "HEAD") and set(query) <= {"x-id", "response-content-type"}:
        return [Asked("s3:GetObject", one)]
    if method == "PUT" and copied_from is not None:
        return [Asked("s3:GetObject", f"arn:aws:s3:::{unquote(copied_from).lstrip('/')}"), Asked("s3:PutObject", one)]
    if (method == "PUT" and set(query) <= {"x-id", "partNumber", "uploadId"}) or (
        method == "POST" and {"uploads", "uploadId"} & set(query)
    ):
        return [Asked("s3:PutObject", one)]
    if method == "DELETE":
        return [Asked("s3:AbortMultipartUpload" if "uploadId" in query else "s3:DeleteObject", one)]
    raise AssertionError(f"Expected a known request of an object, but got {method} {parts.query}.")


@contextmanager
def recorded() -> Iterator[list[Asked]]:
    """Everything that servers of this process are asked inside the block, by any process."""
    found: list[Asked] = []
    true_environment = WSGIRequestHandler.make_environ

    def environment(handler: WSGIRequestHandler) -> Any:
        made, body = true_environment(handler), ""
        if handler.command == "POST" and "delete" in handler.path:
            sent = made["wsgi.input"].read(int(made["CONTENT_LENGTH"]))
            made["wsgi.input"], body = BytesIO(sent), sent.decode()
        found.extend(asked_by(handler.command, handler.path, handler.headers.get("x-amz-copy-source"), body))
        return made

    with mock.patch.object(WSGIRequestHandler, "make_environ", environment):
        yield found


def statements(*names: str, **buckets: str) -> list[dict[str, Any]]:
    """Statements of policies of deploy/aws.

    Args:
        buckets: the bucket that `archive-CHANGE` or `tables-CHANGE` stands for, by `archive` or `tables`.
    """
    text = "\n".join((POLICIES / f"{name}.json").read_text(encoding="utf-8") + "\0" for name in names)
    for name, bucket in buckets.items():
        text = text.replace(f"{name}-CHANGE", bucket)
    return [item for document in text.split("\0")[:-1] for item in json.loads(document)["Statement"]]


def many(value: str | list[str]) -> list[str]:
    """IAM writes one value without brackets."""
    return [value] if isinstance(value, str) else value


def allowed(asked: Asked, by: Iterable[dict[str, Any]]) -> bool:
    """Whether one of the statements allows it; they are all of the kind Allow, without a condition."""
    return any(
        statement["Effect"] == "Allow"
        and "Condition" not in statement
        and asked.action in many(statement["Action"])
        and any(fnmatchcase(asked.resource, pattern) for pattern in many(statement["Resource"]))
        for statement in by
    )
