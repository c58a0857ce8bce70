"""A real S3 server for tests: moto's, in a process of its own."""

import socket
import subprocess
import sys
import uuid
from collections.abc import Iterator
from contextlib import contextmanager

from pyarrow import fs

from tests.processes import wait_until

CREDENTIALS = {"AWS_ACCESS_KEY_ID": "key", "AWS_SECRET_ACCESS_KEY": "secret", "AWS_EC2_METADATA_DISABLED": "true"}


@contextmanager
def s3_server() -> Iterator[str]:
    """Its `host:port`."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    command = [sys.executable, "-m", "moto.server", "-H", "127.0.0.1", "-p", str(port)]
    server = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    try:
        wait_until(lambda: _answers(port), "the S3 server")
        yield f"127.0.0.1:{port}"
    finally:
        server.kill()
        server.wait()


def new_store(endpoint: str) -> str:
    """The URI of a store in a bucket of its own."""
    bucket = f"bucket-{uuid.uuid4().hex[:12]}"
    made = fs.S3FileSystem(
        access_key=CREDENTIALS["AWS_ACCESS_KEY_ID"],
        secret_key=CREDENTIALS["AWS_SECRET_ACCESS_KEY"],
        endpoint_override=f"http://{endpoint}",
        region="us-east-1",
        allow_bucket_creation=True,
    )
    made.create_dir(bucket)
    return f"s3://{bucket}/a/store?endpoint_override={endpoint}&scheme=http&region=us-east-1"


def _answers(port: int) -> bool:
    try:
        socket.create_connection(("127.0.0.1", port), timeout=1).close()
    except OSError:
        return False
    return True
