"""Splits of a recipe whose training pairs are streamed: a first look into the stream, and the split that is scored."""

import re
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from cvlm.config import SKIP, ShardsData, StreamData
from cvlm.data.examples import Examples, Splits
from cvlm.data.from_shards import read_scored
from cvlm.data.shard_index import INDEX, read_folder_index
from cvlm.data.streaming import Stream
from cvlm.errors import CvlmError

SERVED = ("vqa", "retrieval", "snli_ve")


def load(spec: StreamData, task: str) -> Splits:
    """Load the split that is scored, and look into the stream; `train` holds its first pairs.

    Raises:
        CvlmError: a part of it is missing, damaged, or does not fit the task.
    """
    index = read_folder_index(spec.test)
    shards = ShardsData(
        kind="shards",
        path=spec.test,
        evaluate=spec.evaluate,
        answers=spec.answers,
        skip=spec.skip,
        limit=spec.limit,
    )
    test = read_scored(shards, index, task)
    stream = make_stream(
        spec.train,
        samples=spec.samples,
        task=task,
        rule=index.rule,
        answers=test.answers,
        shuffle=spec.shuffle,
        skip=spec.skip,
    )
    return Splits(train=stream.preview(), test=test, stream=stream)


def load_pattern(pattern: str, task: str, answers: tuple[str, ...]) -> Examples | Stream:
    """Return the pairs of some shards: at random access where they belong to one import, else as a stream.

    A stream without an index is read once to be counted.

    Args:
        pattern: see `StreamData.train`.
        task: a key of `cvlm.TASKS`.
        answers: the answer vocabulary; of an import, its own where this is empty.

    Raises:
        CvlmError: a shard is missing, or they do not fit the task.
    """
    urls = expand([pattern])
    folder = Path(urls[0]).parent
    if all(_is_local(url) and Path(url).parent == folder for url in urls) and (folder / INDEX).is_file():
        index = read_folder_index(folder)
        names = {Path(url).name for url in urls}
        entries = tuple(entry for split in index.splits.values() for entry in split if entry.name in names)
        if missing := sorted(names - {entry.name for entry in entries}):
            raise CvlmError(f"{missing[0]} is no shard of the import in {folder}")
        part = index.model_copy(update={"splits": {pattern: entries}, "evaluate": pattern})
        return read_scored(ShardsData(kind="shards", path=folder, answers=answers or None), part, task)
    stream = make_stream([pattern], samples=1, task=task, rule="vqa", answers=answers, skip=SKIP)
    return replace(stream, samples=stream.count())


def make_stream(train: Sequence[str], *, task: str, **settings: Any) -> Stream:
    """Make a stream of URL patterns; the settings are the other fields of `Stream`.

    Raises:
        CvlmError: the task is not served, or a local shard is missing.
    """
    if task not in SERVED:
        raise CvlmError(
            f"streams serve the tasks {', '.join(SERVED)}, not {task!r}; import the data, see cvlm data import"
        )
    urls = expand(train)
    missing = [url for url in urls if _is_local(url) and not Path(url).is_file()]
    if missing:
        raise CvlmError(f"{len(missing)} of {len(urls)} shards do not exist; the first is {missing[0]}")
    return Stream(urls=urls, task=task, **settings)


def expand(patterns: Sequence[str]) -> tuple[str, ...]:
    """Return one URL per shard: `{000..063}` counts, `{a,b}` lists."""
    from webdataset.shardlists import expand_urls

    return tuple(url for pattern in patterns for url in expand_urls(pattern))


def is_pattern(data: object) -> bool:
    """Whether a text names tar shards, and not a folder or a kind of data."""
    return isinstance(data, str) and (data.startswith("pipe:") or re.search(r"\.tar(\.\w+)?$", data) is not None)


def _is_local(url: str) -> bool:
    return not re.match(r"[a-z][a-z0-9+.-]+:", url)
