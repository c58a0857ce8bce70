"""An object store as DuckDB reads it: through pyarrow, by way of fsspec.

DuckDB's own way, its extension httpfs, must be downloaded, and the session loads no extension. What is registered here
opens files for reading and nothing else; which ones, `allowed_directories` says, as for a folder.
"""

from typing import Any

from fsspec.implementations.arrow import ArrowFSWrapper

from ..schemas.store import Store


def object_files(store: Store) -> ArrowFSWrapper:
    """A file system for `DuckDBPyConnection.register_filesystem`."""
    return _ReadOnly(store.filesystem)


class _ReadOnly(ArrowFSWrapper):  # type: ignore[misc]
    protocol = "s3"
    cachable = False

    @classmethod
    def _strip_protocol(cls, path: str) -> str:
        return path.removeprefix("s3://")

    def glob(self, path: str, **_options: Any) -> list[str]:
        """Views name files, not patterns; asking the server whether each is there would cost a request."""
        return [path]

    def _open(self, path: str, mode: str = "rb", **options: Any) -> Any:
        if mode != "rb":
            raise PermissionError(f"{path} is open for reading only")
        return super()._open(path, mode, **options)
