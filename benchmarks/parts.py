"""What an interrupted benchmark leaves behind, so that the same command goes on: `result.json.part/`.

The folder belongs to one model, one split and one group of settings; `key.json` says which. Parts of anything else are
deleted, never read.
"""

import json
import shutil
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from hashlib import sha256
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np
from numpy.typing import NDArray

from cvlm.errors import CvlmError
from cvlm.files import write_atomic
from cvlm.progress import Progress
from distill.store import ArrayStore

KEY = "key.json"
CHUNK = 256
"""Items after which finished work is on disk."""


@contextmanager
def open_parts(result: Path | None, key: Mapping[str, Any]) -> Iterator[Path]:
    """Give a folder for finished parts; it is deleted when the block ends well and kept when it is interrupted.

    Args:
        result: the result file; None keeps parts in a temporary folder, and nothing survives an interruption.
        key: what the parts are valid for: model, data, settings, versions.

    Raises:
        CvlmError: the folder exists and was not made here, or cannot be written.
    """
    if result is None:
        with TemporaryDirectory() as scratch:
            yield Path(scratch)
        return
    folder = result.with_name(f"{result.name}.part")
    content = sha256(json.dumps(key, sort_keys=True).encode()).hexdigest().encode()
    try:
        if folder.exists() and _content(folder / KEY) != content:
            if not (folder / KEY).exists() and any(folder.iterdir()):
                raise CvlmError(
                    f"{folder} stands where unfinished results go and is none; move it, or choose another --out"
                )
            discard(folder)
        folder.mkdir(parents=True, exist_ok=True)
        write_atomic(folder / KEY, content)
    except OSError as error:
        raise CvlmError(f"cannot write unfinished results to {folder}: {error.strerror}") from error
    yield folder
    discard(folder)


def discard(folder: Path) -> None:
    """Delete a folder of parts so that a kill in the middle leaves nothing that looks usable."""
    write_atomic(folder / KEY, b"discarded")
    for path in folder.iterdir():
        if path.is_dir():
            shutil.rmtree(path)
        elif path.name != KEY:
            path.unlink()
    (folder / KEY).unlink()
    folder.rmdir()


def keep_rows(
    folder: Path,
    rows: int,
    compute: Callable[[int, int], NDArray[Any]],
    progress: Progress | None,
    *,
    chunk: int = CHUNK,
) -> NDArray[Any]:
    """Compute rows chunk by chunk; rows that an earlier call finished are read from disk.

    Args:
        folder: of these rows alone.
        rows: how many.
        compute: gives the rows `start:stop` `[stop - start, ...]`.
        progress: called with (done, rows).
        chunk: rows per call.

    Returns:
        `[rows, ...]`.
    """
    store = ArrayStore(folder, rows)
    for start in range(store.done, rows, chunk):
        stop = min(start + chunk, rows)
        values = compute(start, stop)
        store.write(start, {"rows": values}, {"rows": values.shape[1:]})
        if progress is not None:
            progress(stop, rows)
    store.finish({})
    return np.array(store.read()[0]["rows"])  # a copy: the folder is deleted before the caller is done


def keep_texts(
    folder: Path, rows: int, compute: Callable[[int, int], Sequence[str]], progress: Progress | None
) -> list[str]:
    """Like `keep_rows`, for texts."""
    folder.mkdir(parents=True, exist_ok=True)
    texts: list[str] = []
    for start in range(0, rows, CHUNK):
        stop, path = min(start + CHUNK, rows), folder / f"{start:09d}.json"
        if path.exists():
            texts += json.loads(path.read_bytes())
            continue
        fresh = list(compute(start, stop))
        write_atomic(path, json.dumps(fresh).encode())
        texts += fresh
        if progress is not None:
            progress(stop, rows)
    return texts


def _content(path: Path) -> bytes | None:
    return path.read_bytes() if path.is_file() else None
