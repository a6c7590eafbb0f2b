"""What became of each term of a loss, from the logs of a run."""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from cvlm.errors import CvlmError
from cvlm.report.tables import Table

HEADER = ("arm", "term", "first value", "last value", "last weight", "mean share of the gradient")


def term_table(run_dir: Path, arms: Sequence[str]) -> Table:
    """Return one row per trained arm and term, of the first seed; arms without a log are left out.

    Args:
        run_dir: the run folder.
        arms: their names.

    Raises:
        CvlmError: a log is damaged.
    """
    rows: list[tuple[str, ...]] = []
    for arm in arms:
        logs = sorted((run_dir / arm).glob("seed*/log.json"), key=lambda path: int(path.parent.name[4:]))
        log = run_dir / arm / "log.json" if not logs else logs[0]
        if log.is_file():
            rows += [(arm, *row) for row in _rows(_read(log))]
    return Table(header=HEADER, rows=tuple(rows))


def _rows(records: list[dict[str, Any]]) -> list[tuple[str, ...]]:
    names = dict.fromkeys(name[5:] for record in records for name in record if name.startswith("term/"))
    return [
        (
            name,
            *(f"{value:.4g}" for value in _ends([r[f"term/{name}"] for r in records if f"term/{name}" in r])),
            _shown([r[f"weight/{name}"] for r in records if f"weight/{name}" in r][-1:]),
            _shown([r[f"gradient/{name}"] for r in records if f"gradient/{name}" in r]),
        )
        for name in names
    ]


def _ends(values: Sequence[float]) -> tuple[float, float]:
    return values[0], values[-1]


def _shown(values: Sequence[float]) -> str:
    return f"{sum(values) / len(values):.3g}" if values else "-"


def _read(path: Path) -> list[dict[str, Any]]:
    try:
        records = json.loads(path.read_text(encoding="utf-8"))
        if not isinstance(records, list) or not all(isinstance(record, dict) for record in records):
            raise ValueError("it is no list of records")
    except (OSError, ValueError) as error:
        raise CvlmError(f"{path} cannot be read: {error}. Delete it; the report goes without it.") from error
    return records
