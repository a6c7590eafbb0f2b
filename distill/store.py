"""A folder of arrays that is filled row by row, survives a kill at any moment, and is read through memory maps."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from distill.errors import DistillError

Array = NDArray[Any]


class ArrayStore:
    """Named arrays of `rows` rows each.

    `done.json` counts the rows that are safely on disk; `meta.json` comes last and marks a complete store. No pickle
    is read or written.

    Args:
        folder: where the arrays stand or will stand.
        rows: number of rows of every array.
    """

    def __init__(self, folder: Path, rows: int) -> None:
        self.folder, self.rows = folder, rows
        self._arrays: dict[str, Array] = {}

    @property
    def complete(self) -> bool:
        """Whether every row was written and `finish` was called."""
        return (self.folder / "meta.json").exists()

    @property
    def done(self) -> int:
        """Number of leading rows that are on disk."""
        path = self.folder / "done.json"
        return int(json.loads(path.read_text())) if path.exists() else 0

    def write(self, start: int, columns: Mapping[str, Array], shapes: Mapping[str, tuple[int, ...]]) -> None:
        """Write consecutive rows, each array into the leading corner of its row shape.

        Args:
            start: first row.
            columns: name -> `[b, ...]`.
            shapes: name -> shape of one full row; shorter rows (unpadded text) are padded with zeros.

        Raises:
            DistillError: rows were stored before, and these do not fit them.
        """
        self.folder.mkdir(parents=True, exist_ok=True)
        count = 0
        for name, values in columns.items():
            if name not in self._arrays:
                self._arrays[name] = self._open(name, shapes[name], values.dtype)
            count = len(values)
            corner = (slice(start, start + count), *(slice(0, size) for size in values.shape[1:]))
            self._arrays[name][corner] = values
            self._arrays[name].flush()  # type: ignore[attr-defined]
        self._replace("done.json", start + count)

    def finish(self, meta: Mapping[str, Any]) -> None:
        """Mark the store complete and keep `meta` with it."""
        self._replace("meta.json", dict(meta))
        self._arrays.clear()

    def read(self) -> tuple[dict[str, Array], dict[str, Any]]:
        """Return the arrays as read-only memory maps, and the meta data."""
        meta = json.loads((self.folder / "meta.json").read_text())
        return {path.stem: np.load(path, mmap_mode="r") for path in sorted(self.folder.glob("*.npy"))}, meta

    def _open(self, name: str, shape: tuple[int, ...], dtype: Any) -> Array:
        path, full = self.folder / f"{name}.npy", (self.rows, *shape)
        if not self.done:
            return np.lib.format.open_memmap(path, mode="w+", dtype=dtype, shape=full)
        # A new array would leave zeros in the rows that count as done.
        found = np.load(path, mmap_mode="r+") if path.exists() else None
        if found is None or found.shape != full or found.dtype != dtype:
            was = "is missing" if found is None else f"holds {found.dtype} {found.shape}"
            raise DistillError(
                f"{self.done} row(s) are stored already, but {path} {was}, not {np.dtype(dtype)} {full}; delete the "
                "folder to build it again"
            )
        return found

    def _replace(self, name: str, value: Any) -> None:
        part = self.folder / f"{name}.part"
        part.write_text(json.dumps(value))
        part.replace(self.folder / name)
