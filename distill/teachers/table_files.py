"""Reading tables of targets. Every format holds rows `[n_answers]` of `logits` or of `probabilities`, and their keys.

- `.npz`: arrays `logits` or `probabilities` `[n, n_answers]`; `ids` `[n]`, or `pictures` and `texts` `[n]`; and, if
  columns are in another order than the student's answers, `answers` `[n_answers]`.
- `.safetensors`: the tensor likewise; the lists as JSON texts in the file's metadata.
- `.jsonl`: lines `{"id": ..., "probabilities": [...]}`, or `"picture"` and `"text"` in place of the id. A mapping from
  answers, such as people's `{"yes": 0.7, "no": 0.3}`, stands for a list: answers that it lacks have probability 0.
"""

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from safetensors import SafetensorError, safe_open

from distill.errors import DistillError

GIVES = ("logits", "probabilities")


@dataclass(frozen=True, kw_only=True)
class Table:
    """What a file holds.

    Attributes:
        gives: `logits` or `probabilities`.
        values: `[n, n_answers]`, columns in the order of the student's answers.
        keys: one per row: ids, or pairs (picture, text).
        by_id: which of the two.
    """

    gives: str
    values: Any
    keys: Sequence[object]
    by_id: bool


def read_table(path: Path, answers: Sequence[str]) -> Table:
    """Read a file of one of the formats.

    Raises:
        DistillError: the suffix is unknown, or the file is missing, damaged, or incomplete.
    """
    if path.suffix not in _READERS:
        raise DistillError(f"a table of targets ends in {', '.join(_READERS)}, not in {path.suffix!r} ({path})")
    try:
        return _READERS[path.suffix](path, answers)
    except (OSError, ValueError, KeyError, SafetensorError) as error:
        raise DistillError(f"{path} cannot be read as a table of targets: {error or type(error).__name__}") from error


def _npz(path: Path, answers: Sequence[str]) -> Table:
    with np.load(path, allow_pickle=False) as file:
        return _columns(path, {name: file[name] for name in file.files}, answers)


def _safetensors(path: Path, answers: Sequence[str]) -> Table:
    with safe_open(path, "numpy") as file:
        content = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
        content |= {name: json.loads(text) for name, text in (file.metadata() or {}).items() if name in _LISTS}
    return _columns(path, content, answers)


_LISTS = ("ids", "pictures", "texts", "answers")


def _columns(path: Path, content: Mapping[str, Any], answers: Sequence[str]) -> Table:
    gives = _gives(content, str(path))
    lists = {name: [str(item) for item in content[name]] for name in _LISTS if name in content}
    by_id = "ids" in lists
    if not by_id and not {"pictures", "texts"} <= lists.keys():
        raise ValueError("it needs ids, or pictures and texts")
    keys = lists["ids"] if by_id else list(zip(lists["pictures"], lists["texts"], strict=True))
    values = np.asarray(content[gives], dtype=np.float64)
    if len(values) != len(keys):
        raise ValueError(f"it has {len(keys)} keys and {len(values)} rows")
    named = lists.get("answers")
    if named is not None:
        if sorted(named) != sorted(answers):
            differ = sorted(set(named) ^ set(answers))[:5]
            raise ValueError(f"its answers are not the student's; for instance {differ} stand on one side alone")
        values = values[:, [named.index(answer) for answer in answers]]
    return Table(gives=gives, values=values, keys=keys, by_id=by_id)


def _lines(path: Path, answers: Sequence[str]) -> Table:
    rows = []
    for number, line in enumerate(path.read_text(encoding="utf-8-sig").split("\n"), start=1):
        if line.strip():
            try:
                rows.append(_line(json.loads(line), answers, f"line {number}"))
            except (ValueError, TypeError, AttributeError) as error:
                raise ValueError(f"line {number}: {error}") from error
    kinds = {(gives, isinstance(key, str)) for gives, key, _ in rows}
    if len(kinds) != 1:
        raise ValueError("it is empty" if not rows else "its lines differ in how they name pairs, or in what they give")
    ((gives, by_id),) = kinds
    return Table(gives=gives, values=[values for _, _, values in rows], keys=[key for _, key, _ in rows], by_id=by_id)


def _line(row: Mapping[str, Any], answers: Sequence[str], place: str) -> tuple[str, object, list[float]]:
    gives = _gives(row, place)
    if "id" not in row and not {"picture", "text"} <= row.keys():
        raise ValueError("it needs an id, or picture and text")
    key: object = str(row["id"]) if "id" in row else (str(row["picture"]), str(row["text"]))
    values = row[gives]
    if not isinstance(values, Mapping):
        return gives, key, _numbers(values, len(answers))
    unknown = [answer for answer in values if answer not in answers]
    if unknown:
        raise ValueError(f"the answer {unknown[0]!r} is none of the student's {len(answers)}")
    if gives == "logits" and len(values) < len(answers):
        raise ValueError(f"logits need all {len(answers)} answers, it names {len(values)}")
    return gives, key, _numbers([values.get(answer, 0.0) for answer in answers], len(answers))


def _numbers(values: Sequence[Any], wanted: int) -> list[float]:
    if len(values) != wanted:
        raise ValueError(f"it has {len(values)} numbers for {wanted} answers")
    return [float(value) for value in values]


def _gives(content: Mapping[str, Any], place: str) -> str:
    given = [name for name in GIVES if name in content]
    if len(given) != 1:
        raise ValueError(f"{place} needs one of {' and '.join(GIVES)}, it has {' and '.join(given) or 'none'}")
    return given[0]


_READERS: dict[str, Callable[[Path, Sequence[str]], Table]] = {
    ".npz": _npz,
    ".safetensors": _safetensors,
    ".jsonl": _lines,
}
