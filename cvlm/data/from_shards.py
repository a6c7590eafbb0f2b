"""Splits out of imported shards: questions with people's answers, statements with one, one query per caption."""

from typing import Any

import numpy as np
from numpy.typing import NDArray

from cvlm.config import ShardsData
from cvlm.data.answers import SoftLabels, single_labels
from cvlm.data.examples import Examples, Splits, index_texts
from cvlm.data.screening import screen
from cvlm.data.shard_index import FolderIndex, read_folder_index
from cvlm.data.shards import ShardReader
from cvlm.errors import CvlmError
from cvlm.tasks import TASKS


def load(spec: ShardsData, task: str) -> Splits:
    """Load `train` and the split that is scored.

    Raises:
        CvlmError: no import, one of another task, a split is missing, or something was changed after the import.
    """
    index = read_folder_index(spec.path)
    test = read_scored(spec, index, task)
    return Splits(train=read_split(spec, index, "train").limit(spec.limit), test=test)


def read_scored(spec: ShardsData, index: FolderIndex, task: str) -> Examples:
    """Return the split that is scored.

    Raises:
        CvlmError: as `load`.
    """
    if index.task != task:
        raise CvlmError(f"{spec.path} was imported for task {index.task!r}, not {task!r} (format {index.data_format})")
    scored = spec.evaluate if spec.evaluate is not None else index.evaluate
    test = read_split(spec, index, scored).limit(spec.limit)
    if task != "retrieval" and len(test.labelled) < len(test):
        raise CvlmError(
            f"{len(test) - len(test.labelled)} of {len(test)} texts of the split {scored!r} in {spec.path} have no "
            "answer to score; take another with data.evaluate"
        )
    return test


def read_split(spec: ShardsData, index: FolderIndex, split: str) -> Examples:
    """Return one split; its pictures are read when they are needed.

    Raises:
        CvlmError: as `load`.
    """
    reader = ShardReader(spec.path, split, index)
    # Every sample has a text at least: the first `limit` pairs stand in the first `limit` samples.
    number = len(reader) if spec.limit is None else min(spec.limit, len(reader))
    broken = screen(reader, number, spec.skip)
    sound = [position for position in range(number) if position not in broken]
    rows: list[dict[str, Any]] = []
    places: list[int] = []
    for kept, position in enumerate(sound):
        texts = reader.record(position)["texts"]
        rows += texts
        places += [kept] * len(texts)
    shown = TASKS[index.task].pictures
    pictures = [picture for position in sound for picture in reader.pictures(position)]
    if len(pictures) != shown * len(sound):
        raise CvlmError(f"{spec.path}: samples of task {index.task!r} have {shown} picture(s) each; import again")
    image_of = np.array(places, dtype=np.int64)
    common: dict[str, Any] = {
        "name": index.name,
        "split": split,
        "pictures": pictures,
        "image_of": image_of if shown == 1 else image_of[:, None] * shown + np.arange(shown),
        "ids": tuple(row["id"] for row in rows),
        "types": tuple(row.get("type", "") for row in rows),
        "skipped": tuple(broken.values()),
        "answer_types": tuple(kinds) if any(kinds := [row.get("answer_type", "") for row in rows]) else (),
    }
    if index.task == "retrieval":
        # Every caption is a query of its own, as in COCO and Flickr: two pictures may well share one wording.
        each = np.arange(len(rows), dtype=np.int64)
        return Examples(texts=tuple(row["text"] for row in rows), text_of=each, labels=image_of, **common)
    texts, text_of = _statements(rows) if index.task == "nlvr2" else index_texts([row["text"] for row in rows])
    given = [tuple(row.get("answers", ())) for row in rows]
    answers = spec.answers if spec.answers is not None else index.answers
    if TASKS[index.task].answers:
        labels = single_labels(given, answers)
        return Examples(texts=texts, text_of=text_of, labels=labels, answers=answers, **common)
    return Examples(
        texts=texts,
        text_of=text_of,
        labels=SoftLabels.of(given, answers, index.rule),
        answers=answers,
        references=tuple(given) if index.rule == "vqa" and all(given) else (),
        truths=tuple(one[0] for one in given) if index.rule == "exact" and all(given) else (),
        **common,
    )


def _statements(rows: list[dict[str, Any]]) -> tuple[tuple[str, ...], NDArray[np.int64]]:
    """Index the statements of NLVR2, each a text of its own: two sets of pictures may share one wording.

    As the official script for consistency has it, a statement is its identifier `SPLIT-SET-PAIR-SENTENCE` without PAIR.
    """
    keys = []
    for row in rows:
        split, group, _, sentence = row["id"].split("-")
        keys.append(f"{split}-{group}-{sentence} {row['text']}")
    distinct, text_of = index_texts(keys)
    return tuple(key.partition(" ")[2] for key in distinct), text_of
