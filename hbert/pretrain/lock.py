"""A lock on a folder, which one process holds and which ends with it, however it ends."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from hbert.errors import HbertError

try:
    import fcntl
except ImportError:  # Windows
    fcntl = None  # type: ignore[assignment]

LOCK = ".lock"


@contextmanager
def locked(folder: Path) -> Iterator[None]:
    """Holds the lock of a folder while the block runs; without effect where the system or the disk has no such locks.

    Raises:
        HbertError: another process holds it.
        OSError: the folder cannot be written to.
    """
    if fcntl is None:
        yield
        return
    path = folder / LOCK
    descriptor = _lock(path)
    try:
        yield
    finally:
        # Before it is released: whoever locks it later finds that it is no longer the file of this name.
        with suppress(OSError):
            path.unlink()
        os.close(descriptor)


def _lock(path: Path) -> int:
    while True:
        descriptor = os.open(path, os.O_RDWR | os.O_CREAT, 0o666)
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            os.close(descriptor)
            raise HbertError(
                f"another process trains into --out {path.parent}; wait for its end, or choose another folder"
            ) from None
        except OSError:
            return descriptor  # some network file systems have no locks
        with suppress(FileNotFoundError):
            if os.path.samestat(os.fstat(descriptor), path.stat()):
                return descriptor
        os.close(descriptor)
