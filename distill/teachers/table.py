"""Targets that were made before and stand in a file: of a simulator, of another program, of people."""

import json
import logging
from collections.abc import Callable, Mapping, Sequence
from hashlib import sha256
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from PIL.Image import Image

from distill.errors import DistillError
from distill.signal import Request, Signal
from distill.teachers.base import PairKey
from distill.teachers.given import as_logits
from distill.teachers.table_files import read_table

logger = logging.getLogger(__name__)

NAMED = 5
"""How many missing pairs a message names."""


class TableTeacher:
    """Looks up logits by the id of a pair, or by its picture and text; see `distill.Teacher`.

    Args:
        path: a file `.npz`, `.safetensors` or `.jsonl`, see `distill.teachers.table_files`.
        answers: the vocabulary of the student; a file that names its answers is brought into this order.
        skip: share of a split's pairs that the table may lack; they are left out of training.
        pictures: how many pictures an example shows; they are not looked at.

    Raises:
        DistillError: the file cannot be read, holds no distributions over these answers, or lists a pair twice.
    """

    depth = 0
    keyed = True
    fields = frozenset({"logits"})

    def __init__(self, *, path: str | Path, answers: Sequence[str] = (), skip: float = 0.0, pictures: int = 1) -> None:
        if not answers:
            raise DistillError(
                "teacher 'table' gives numbers over answers and needs the vocabulary: answers=[...]; a task without "
                "answers cannot learn from it"
            )
        if not 0 <= skip < 1:
            raise DistillError(f"teacher 'table': skip is {skip}, it must be a share of at least 0 and below 1")
        self.path, self.answers, self.skip, self.pictures = Path(path), tuple(answers), skip, pictures
        self.name = f"table ({self.path})"
        table = read_table(self.path, self.answers)
        self._logits = as_logits(table.values, table.gives, self.answers, [_called(key) for key in table.keys])
        self._by_id = table.by_id
        self._row: dict[object, int] = {}
        for row, key in enumerate(table.keys):
            if self._row.setdefault(key, row) != row:
                raise DistillError(f"{self.path} lists {_called(key)} twice; keep one of the rows")

    @property
    def fingerprint(self) -> str:
        """SHA-256 of the file and of the settings."""
        return sha256(self.path.read_bytes() + f"{self.answers}|{self.skip}".encode()).hexdigest()

    def missing(self, keys: Sequence[PairKey]) -> list[int]:
        """Return the places of pairs that stand in no row.

        Raises:
            DistillError: they are more than `skip` allows, or the table goes by id and the data has none.
        """
        if self._by_id and any(key.id is None for key in keys):
            raise DistillError(f"{self.path} lists pairs by id, and the data has no ids; list them by picture and text")
        places = [place for place, key in enumerate(keys) if self._key(key) not in self._row]
        if not places:
            return places
        named = ", ".join(str(keys[place]) for place in places[:NAMED])
        more = f", and {len(places) - NAMED} more" if len(places) > NAMED else ""
        text = f"{self.path} lacks {len(places)} of {len(keys)} pairs: {named}{more}"
        if len(places) > self.skip * len(keys):
            raise DistillError(f"{text}. Add them, or allow it with skip: {len(places) / len(keys):.3f} or more")
        logger.warning("%s; they are left out where the teacher teaches", text)
        return places

    def look_up(self, keys: Sequence[PairKey], load: Callable[[], Sequence[Image]]) -> Mapping[str, Any]:
        """Read rows; those of missing pairs, which no phase asks for, are zero."""
        rows: NDArray[np.float32] = np.zeros((len(keys), len(self.answers)), dtype=np.float32)
        for place, key in enumerate(keys):
            row = self._row.get(self._key(key))
            if row is not None:
                rows[place] = self._logits[row]
        return {"logits": torch.from_numpy(rows)}

    def prepare(self, images: Sequence[Image], texts: Sequence[str]) -> Mapping[str, Any]:
        """Refuse: pictures and texts alone do not say which pairs these are."""
        raise DistillError(f"{self.name} looks pairs up by their keys; call look_up")

    def signal(self, inputs: Mapping[str, Any], request: Request) -> Signal:
        """Return what was looked up."""
        return Signal(logits=inputs["logits"])

    def to(self, device: Any) -> "TableTeacher":
        """Stay: the table lies in memory."""
        return self

    def _key(self, key: PairKey) -> object:
        return key.id if self._by_id else (key.picture, key.text)


def _called(key: object) -> str:
    return f"the pair {json.dumps(key)}"
