"""Writing a file whole or not at all; every room that keeps results uses this."""

import os
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import IO, Any


def write_atomic(path: Path, content: bytes) -> None:
    """Write a file whole: a reader finds the old content or the new, and a crash leaves the old."""
    write_with(path, lambda stream: stream.write(content))


def write_with(path: Path, fill: Callable[[IO[bytes]], Any]) -> None:
    """Like `write_atomic`, for content that `fill` writes into an open file."""
    handle, name = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.", suffix=".part")
    temporary = Path(name)
    try:
        with os.fdopen(handle, "wb") as stream:
            fill(stream)
            stream.flush()
            os.fsync(stream.fileno())
        # mkstemp makes files private; a result is as readable as any other file that the user writes.
        mask = os.umask(0)
        os.umask(mask)
        temporary.chmod(0o666 & ~mask)
        temporary.replace(path)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise
