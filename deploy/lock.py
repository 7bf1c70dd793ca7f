"""A lock that one run holds at a time: the kernel's own, which also holds between containers and ends with its process."""

import contextlib
import errno
import fcntl
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

UNSUPPORTED = {errno.ENOLCK, errno.ENOSYS, errno.EOPNOTSUPP, errno.EINVAL}  # by the file system


class HeldError(Exception):
    """Another run holds the lock."""


def _opened(path: Path) -> int:
    """Return a descriptor of the file at `path`, locked. Raises HeldError, and OSError where no file can be made."""
    while True:
        file = os.open(path, os.O_CREAT | os.O_RDWR | os.O_NOFOLLOW | os.O_CLOEXEC, 0o666)
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            os.close(file)
            raise HeldError from None
        except OSError as error:
            if error.errno not in UNSUPPORTED:
                os.close(file)
                raise
        with contextlib.suppress(FileNotFoundError):
            if os.fstat(file).st_ino == os.stat(path).st_ino:
                return file
        os.close(file)  # the run before removed its file between the two calls: it was the lock of nobody


@contextmanager
def locked(path: Path) -> Iterator[None]:
    """Hold the lock file at `path`, which is made, and removed at the end.

    Raises HeldError while another run holds it, and OSError where no file can be made. A file system without locks locks
    nothing.
    """
    file = _opened(path)
    try:
        yield
    finally:
        with contextlib.suppress(OSError):
            path.unlink()
        os.close(file)
