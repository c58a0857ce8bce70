"""From a store's URI, `s3://bucket/prefix`, to the pyarrow file system behind it: S3, or what speaks its protocol.

Where the server is stands in the URI, `?endpoint_override=host:port&scheme=http`, or in AWS_ENDPOINT_URL_S3 or
AWS_ENDPOINT_URL, which pyarrow itself does not look at (https://github.com/apache/arrow/issues/49643).
"""

from __future__ import annotations

import os
import re
from urllib.parse import parse_qsl, unquote, urlsplit

import pyarrow as pa
from pyarrow import fs

S3_OPTIONS = ("endpoint_override", "region", "scheme")
ENDPOINT_VARIABLES = ("AWS_ENDPOINT_URL_S3", "AWS_ENDPOINT_URL")
REGION_VARIABLES = ("AWS_REGION", "AWS_DEFAULT_REGION")


def connect(uri: str) -> tuple[str, fs.FileSystem, str]:
    """The URI without what only says how to get there, the file system, and the store's path in it.

    Raises:
        ValueError: no URI of a store.
    """
    parts = urlsplit(uri)
    if parts.scheme != "s3":
        raise ValueError(f"store {uri!r} is neither a folder nor an object store: pass a path, or s3://BUCKET/PREFIX")
    bucket, prefix = parts.netloc.rpartition("@")[2], unquote(parts.path).strip("/")
    if not bucket:
        raise ValueError(f"store {uri!r} names no bucket: pass s3://BUCKET/PREFIX")
    root = f"{bucket}/{prefix}".rstrip("/")
    plain = f"s3://{root}"
    try:
        return plain, _s3(parts.query, bucket), root
    except (OSError, ValueError, pa.ArrowException) as error:
        raise ValueError(f"store {plain!r} cannot be used: {one_line(error)}") from None


def one_line(error: BaseException) -> str:
    """A storage error as people read it, with what to do where that is known."""
    if isinstance(error, OSError) and error.strerror and not error.strerror.startswith("When "):
        return error.strerror
    text = " ".join(str(error).split()) or type(error).__name__
    found = re.search(r"AWS Error ([A-Z_]+)[^:]*(?:: )?(.*)", text)
    if found is None:
        return text
    kind, detail = found.groups()
    remedy = next((words for part, words in _REMEDIES.items() if part in f"{kind} {detail}"), "")
    return f"{kind.replace('_', ' ').lower()}{f' ({remedy})' if remedy else f', {detail}' if detail else ''}"


_CREDENTIALS = "check AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY, or the machine's role"
_REMEDIES = {
    "NO_SUCH_BUCKET": "make the bucket, or check its name and the endpoint",
    "NETWORK_CONNECTION": "check the endpoint: ?endpoint_override=HOST:PORT&scheme=http, or AWS_ENDPOINT_URL",
    "ACCESS_DENIED": _CREDENTIALS,
    "INVALID_ACCESS_KEY": _CREDENTIALS,
    "SIGNATURE": _CREDENTIALS,
    "HTTP response code: 301": "check the region: ?region=NAME, or AWS_REGION",
    "HTTP response code: 403": _CREDENTIALS,
}


def _s3(query: str, bucket: str) -> fs.S3FileSystem:
    options = dict(parse_qsl(query))
    for name in options.keys() - set(S3_OPTIONS):
        raise ValueError(f"it has an option {name!r}: known are {', '.join(S3_OPTIONS)}")
    endpoint = options.get("endpoint_override") or _first(ENDPOINT_VARIABLES)
    region = options.get("region") or _first(REGION_VARIABLES)
    if region is None and endpoint is None:
        region = fs.resolve_s3_region(bucket)
    # Small files go by one request, when they are closed, instead of four.
    return fs.S3FileSystem(
        endpoint_override=endpoint, region=region, scheme=options.get("scheme"), allow_delayed_open=True
    )


def _first(variables: tuple[str, ...]) -> str | None:
    return next((value for name in variables if (value := os.environ.get(name))), None)
