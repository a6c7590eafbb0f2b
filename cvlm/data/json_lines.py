"""A folder of the user's own: `train.jsonl` and `test.jsonl`, one `{"image", "text", "answer"}` per line.

Lines of texts alone have no `image`.
"""

import json
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from cvlm.config import JsonLinesData
from cvlm.data.examples import UNLABELLED, Examples, PictureFile, Splits, index_texts
from cvlm.errors import CvlmError, nearest
from cvlm.tasks import TASKS

Row = dict[str, Any]


def load(spec: JsonLinesData, task: str) -> Splits:
    """Read both splits. Where a task has answers every test line needs one; training lines without are unlabelled.

    Raises:
        CvlmError: a file is missing, a line is damaged, or an answer is outside the vocabulary.
    """
    if TASKS[task].pictures > 1:
        raise CvlmError(f"data kind 'jsonl' has one picture per line, task {task!r} has two; see cvlm data import")
    train_rows, test_rows = (_rows(spec.path / f"{split}.jsonl", task) for split in ("train", "test"))
    answers = spec.answers if spec.answers is not None else _vocabulary(train_rows, task)
    return Splits(
        train=_split(spec, "train", train_rows, answers, task).limit(spec.limit),
        test=_split(spec, "test", test_rows, answers, task).limit(spec.limit),
    )


def _rows(path: Path, task: str) -> list[Row]:
    try:
        # No splitlines: it also breaks at characters that JSON allows inside a text, such as U+2028.
        lines = path.read_text(encoding="utf-8-sig").split("\n")
    except OSError as error:
        raise CvlmError(f"cannot read {path}: {error.strerror}") from error
    except UnicodeDecodeError as error:
        raise CvlmError(f"{path} is not UTF-8 text: {error}") from error
    rows = []
    for number, line in enumerate(lines, start=1):
        if not line.strip():
            continue
        try:
            row = json.loads(line)
        except ValueError as error:
            raise CvlmError(f"{path} line {number} is not JSON: {error}") from error
        rows.append({**_checked(row, f"{path} line {number}", task), "line": number})
    return rows


def _checked(row: Any, place: str, task: str) -> Row:
    keys = ("image", "text") if TASKS[task].pictures else ("text",)
    if not isinstance(row, dict):
        raise CvlmError(f'{place} must be an object such as {{"image": "1.png", "text": "...", "answer": "yes"}}')
    for key in keys:
        if not isinstance(row.get(key), str) or not row[key].strip():
            raise CvlmError(f"{place}: {key!r} must be a text that is not empty, got {row.get(key)!r}")
    answer = row.get("answer")
    if answer is not None and (not isinstance(answer, str) or not answer.strip()):
        raise CvlmError(f"{place}: 'answer' must be a text that is not empty, got {answer!r}; leave it out if unknown")
    return row


def _vocabulary(rows: list[Row], task: str) -> tuple[str, ...]:
    if task == "retrieval" or TASKS[task].answers:
        return TASKS[task].answers
    return tuple(sorted({row["answer"] for row in rows if row.get("answer") is not None}))


def _split(spec: JsonLinesData, split: str, rows: list[Row], answers: tuple[str, ...], task: str) -> Examples:
    files, image_of = index_texts([row["image"] for row in rows]) if TASKS[task].pictures else _no_pictures(len(rows))
    for file in files:
        if not (spec.path / file).is_file():
            raise CvlmError(f"{spec.path / f'{split}.jsonl'} names the image {file!r}, which is not in {spec.path}")
    texts, text_of = index_texts([row["text"] for row in rows])
    if task == "retrieval":
        # Every caption is a query of its own, as in COCO and Flickr: two pictures may well share one wording.
        texts, text_of = tuple(row["text"] for row in rows), np.arange(len(rows), dtype=np.int64)
    index = {answer: position for position, answer in enumerate(answers)}
    labels = [_label(row, spec.path / f"{split}.jsonl", index) for row in rows] if answers else image_of
    if answers and split == "test" and UNLABELLED in labels:
        line = rows[list(labels).index(UNLABELLED)]["line"]
        raise CvlmError(f"{spec.path / 'test.jsonl'} line {line} has no answer; every test question needs one")
    return Examples(
        name=spec.path.resolve().name,
        split=split,
        pictures=[PictureFile(spec.path / file) for file in files],
        texts=texts,
        image_of=image_of,
        text_of=text_of,
        labels=np.asarray(labels, dtype=np.int64),
        answers=answers,
    )


def _no_pictures(rows: int) -> tuple[tuple[str, ...], NDArray[np.int64]]:
    return (), np.empty((rows, 0), dtype=np.int64)


def _label(row: Row, path: Path, answers: dict[str, int]) -> int:
    answer = row.get("answer")
    if answer is None:
        return UNLABELLED
    if answer not in answers:
        raise CvlmError(
            f"{path} line {row['line']}: the answer {answer!r} is outside the vocabulary of {len(answers)} "
            f"answers{nearest(answer, answers)}; add it to data.answers or correct the line"
        )
    return answers[answer]
