"""A folder, local or behind any fsspec URL (s3://, gs://, memory://), with the few operations a checkpoint needs."""

import contextlib
import os
import zlib
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from fsspec.core import url_to_fs
from fsspec.implementations.local import LocalFileSystem

from dtron.errors import UserError

__all__ = ["StoragePath"]

BLOCK_BYTES = 1 << 22


@dataclass(frozen=True)
class StoragePath:
    """`url`: a local path or an fsspec URL, without a slash at its end.

    OSError where the storage fails; UserError where fsspec does not know the kind of URL, or lacks its package.
    """

    url: str

    @classmethod
    def at(cls, where: "str | Path | StoragePath") -> "StoragePath":
        return where if isinstance(where, StoragePath) else cls(str(where).rstrip("/"))

    def __truediv__(self, name: str) -> "StoragePath":
        return StoragePath(f"{self.url}/{name}")

    def __str__(self) -> str:
        return self.url

    @property
    def name(self) -> str:
        return self.url.rsplit("/", 1)[-1]

    @property
    def parent(self) -> "StoragePath":
        return StoragePath(self.url.rsplit("/", 1)[0])

    @property
    def local(self) -> Path | None:
        """The path, where the folder is on a file system of this machine."""
        fs, path = self._fs()
        return Path(path) if isinstance(fs, LocalFileSystem) else None

    def _fs(self) -> tuple[Any, str]:
        try:
            return url_to_fs(self.url)
        except (ImportError, ValueError) as error:  # a protocol that fsspec does not know or has no package for
            raise UserError(f"{self.url}: {error}") from error

    def names(self) -> list[str]:
        """Names of the files and folders in it, sorted; none where there is no such folder."""
        fs, path = self._fs()
        fs.invalidate_cache(path)
        try:
            return sorted(entry.rstrip("/").rsplit("/", 1)[-1] for entry in fs.ls(path, detail=False))
        except (FileNotFoundError, NotADirectoryError):
            return []

    def exists(self) -> bool:
        fs, path = self._fs()
        return fs.exists(path)

    def make(self) -> None:
        """Make the folder, and those above it."""
        fs, path = self._fs()
        fs.makedirs(path, exist_ok=True)

    def read(self) -> bytes:
        fs, path = self._fs()
        return fs.cat_file(path)

    def write(self, data: bytes) -> None:
        """Write a whole file; on a local disk it is durable afterwards."""
        fs, path = self._fs()
        with fs.open(path, "wb") as file:
            file.write(data)
            file.flush()
            if self.local:
                os.fsync(file.fileno())

    def size(self) -> int:
        fs, path = self._fs()
        return fs.info(path)["size"]

    def crc32(self) -> int:
        """Checksum of a file's contents."""
        fs, path = self._fs()
        total = 0
        with fs.open(path, "rb") as file:
            while block := file.read(BLOCK_BYTES):
                total = zlib.crc32(block, total)
        return total

    def move(self, target: "StoragePath") -> None:
        """Rename, in one operation on a local disk; OSError if there is something else of that name."""
        fs, path = self._fs()
        if local := self.local:
            local.rename(str(target.local))
        elif target.exists():
            raise FileExistsError(f"{target} exists already")
        else:
            fs.mv(path, target._fs()[1], recursive=True)

    def remove(self) -> None:
        """Delete the folder with all there is in it."""
        fs, path = self._fs()
        fs.rm(path, recursive=True)

    def remove_files(self, names: Sequence[str]) -> None:
        """Delete these files in the folder, in this order; one that is missing is no error."""
        fs, path = self._fs()
        for name in names:
            with contextlib.suppress(FileNotFoundError):
                fs.rm_file(f"{path}/{name}")

    def sync(self) -> None:
        """Make the names in a local folder durable, as `fsync` on a file does not."""
        if local := self.local:
            handle = os.open(local, os.O_RDONLY)
            with contextlib.suppress(OSError):  # a file system that cannot has nothing more to offer
                os.fsync(handle)
            os.close(handle)
