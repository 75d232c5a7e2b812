"""A disk that is full on rank 1, from the second checkpoint on, after the first kilobytes of it."""

import errno
import os
from typing import Any

from torch.distributed.checkpoint.filesystem import FileSystem

_create_stream = FileSystem.create_stream
_opened = []


class _Full:
    """A file that takes 5,000 bytes."""

    def __init__(self, file: Any) -> None:
        self._file, self._left = file, 5000

    def write(self, data: Any) -> int:
        self._left -= len(data)
        if self._left < 0:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        return self._file.write(data)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._file, name)


class _Stream:
    def __init__(self, stream: Any) -> None:
        self._stream = stream

    def __enter__(self) -> Any:
        return _Full(self._stream.__enter__())

    def __exit__(self, *error: Any) -> Any:
        return self._stream.__exit__(*error)


def _create(self: Any, path: Any, mode: str) -> Any:
    stream = _create_stream(self, path, mode)
    if "w" in mode and os.environ["RANK"] == "1":
        _opened.append(path)
        return _Stream(stream) if len(_opened) > 1 else stream
    return stream


FileSystem.create_stream = _create  # type: ignore[method-assign]
