"""Files that are whole or not there, whatever kills the writer."""

from __future__ import annotations

import fcntl
import os
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path


def write_whole(file: Path, content: bytes | memoryview) -> None:
    """Writes a file under another name beside it, forces it to the disk, and renames it.

    A kill or a full disk leaves what was there before. (The other name is fixed, so that the next attempt overwrites
    what a kill has left.)

    Raises:
        OSError: If it cannot be written; the message names the file.
    """
    part = file.with_name(f"{file.name}.tmp")
    try:
        file.parent.mkdir(parents=True, exist_ok=True)
        with part.open("wb") as stream:
            stream.write(content)
            stream.flush()
            put_in_place(stream.fileno(), file)
    except OSError as error:
        part.unlink(missing_ok=True)
        raise OSError(error.errno, error.strerror, str(file)) from error


@contextmanager
def one_after_the_other(folder: Path) -> Iterator[None]:
    """Lets one process at a time work in a folder, where its file system has locks."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        with suppress(OSError):
            fcntl.flock(descriptor, fcntl.LOCK_EX)
        yield
    finally:
        os.close(descriptor)


def put_in_place(descriptor: int, file: Path) -> None:
    """Forces ``FILE.tmp``, open and flushed as `descriptor`, to the disk and renames it to FILE."""
    os.fsync(descriptor)
    os.replace(file.with_name(f"{file.name}.tmp"), file)
    folder = os.open(file.parent, os.O_RDONLY)
    try:
        os.fsync(folder)
    finally:
        os.close(folder)


def existing(folder: Path) -> Path:
    """Returns a folder, or the nearest above it that there is."""
    return next(each for each in (folder, *folder.absolute().parents) if each.exists())
