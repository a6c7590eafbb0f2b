"""Splits out of imported shards: questions with people's answers, statements with one, one query per caption."""

from typing import Any

import numpy as np

from cvlm.config import ShardsData
from cvlm.data.answers import UNLABELLED, SoftLabels
from cvlm.data.examples import Examples, Splits, index_texts
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
    if index.task != task:
        raise CvlmError(f"{spec.path} was imported for task {index.task!r}, not {task!r} (format {index.data_format})")
    scored = spec.evaluate if spec.evaluate is not None else index.evaluate
    train = read_split(spec, index, "train").limit(spec.limit)
    test = read_split(spec, index, scored).limit(spec.limit)
    if task != "retrieval" and len(test.labelled) < len(test):
        raise CvlmError(
            f"{len(test) - len(test.labelled)} of {len(test)} texts of the split {scored!r} in {spec.path} have no "
            "answer to score; take another with data.evaluate"
        )
    return Splits(train=train, test=test)


def read_split(spec: ShardsData, index: FolderIndex, split: str) -> Examples:
    """Return one split; its pictures are read when they are needed.

    Raises:
        CvlmError: as `load`.
    """
    reader = ShardReader(spec.path, split, index)
    rows: list[dict[str, Any]] = []
    places: list[int] = []
    for position in range(len(reader)):
        texts = reader.record(position)["texts"]
        rows += texts
        places += [position] * len(texts)
    shown = TASKS[index.task].pictures
    pictures = [picture for position in range(len(reader)) for picture in reader.pictures(position)]
    if len(pictures) != shown * len(reader):
        raise CvlmError(f"{spec.path}: samples of task {index.task!r} have {shown} picture(s) each; import again")
    image_of = np.array(places, dtype=np.int64)
    common: dict[str, Any] = {
        "name": index.name,
        "split": split,
        "pictures": pictures,
        "image_of": image_of if shown == 1 else image_of[:, None] * shown + np.arange(shown),
        "ids": tuple(row["id"] for row in rows),
        "types": tuple(row.get("type", "") for row in rows),
    }
    if index.task == "retrieval":
        # Every caption is a query of its own, as in COCO and Flickr: two pictures may well share one wording.
        each = np.arange(len(rows), dtype=np.int64)
        return Examples(texts=tuple(row["text"] for row in rows), text_of=each, labels=image_of, **common)
    texts, text_of = index_texts([row["text"] for row in rows])
    given = [tuple(row.get("answers", ())) for row in rows]
    answers = spec.answers if spec.answers is not None else index.answers
    if TASKS[index.task].answers:
        place = {answer: position for position, answer in enumerate(answers)}
        truths = [place.get(one[0], UNLABELLED) if one else UNLABELLED for one in given]
        labels = np.array(truths, dtype=np.int64)
        return Examples(texts=texts, text_of=text_of, labels=labels, answers=answers, **common)
    return Examples(
        texts=texts,
        text_of=text_of,
        labels=SoftLabels.of(given, answers, index.rule),
        answers=answers,
        references=tuple(given) if index.rule == "vqa" and all(given) else (),
        **common,
    )
