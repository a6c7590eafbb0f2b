"""Training pairs from shards that are only ever read from front to back: from other machines, programs, plain tars.

Nothing is stored and nothing is known in advance, so towers and teachers run live, an epoch is as long as the recipe
says, and its order is a shuffle of shards with a shuffle buffer behind it. Steps are equal on every process by
construction: each reads on, from the beginning if need be, until it has what its steps take.
"""

import json
import logging
import math
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from itertools import count, islice
from pathlib import Path
from random import Random
from typing import Any

import numpy as np

from cvlm.data.answers import SoftLabels, single_labels
from cvlm.data.examples import Examples, index_texts
from cvlm.data.order import share_of
from cvlm.data.screening import refuse_too_many
from cvlm.data.stream_pairs import StreamPair, StreamPicture, pairs_of
from cvlm.data.tar_stream import RawSample, read_samples
from cvlm.errors import CvlmError
from cvlm.tasks import TASKS

logger = logging.getLogger(__name__)

PREVIEW = 256
"""Pairs that are read before training: what is wrong with the stream as such is found there, and costs are counted."""


@dataclass(kw_only=True)
class Tally:
    """What one process has read, in pairs, and what was broken; a sample that gives no pair counts as one.

    Attributes:
        share: of the pairs that may be broken.
        expected: pairs of an epoch; the budget is never smaller than theirs.
        file: JSON lines that keep what was skipped, for the report; None keeps nothing.
    """

    share: float
    expected: int
    file: Path | None = None
    read: int = 0
    lost: int = 0
    broken: dict[str, str] = field(default_factory=dict)

    def skip(self, name: str, problem: str) -> None:
        """Note a broken pair or sample; the problem is a sentence that holds the name.

        Raises:
            CvlmError: there are too many.
        """
        self.lost += 1
        if name not in self.broken:
            self.broken[name] = problem
            logger.warning("left out of the stream: %s", problem)
            if self.file is not None:
                with self.file.open("a", encoding="utf-8") as file:
                    file.write(json.dumps(problem) + "\n")
        number = max(self.read, self.expected)
        refuse_too_many("streamed pairs", self.lost, list(self.broken.values()), number, self.share)


@dataclass(frozen=True, kw_only=True)
class Stream:
    """Shards and how to make training pairs of them.

    Attributes:
        urls: one per shard.
        samples: pairs per epoch.
        task: a key of `cvlm.TASKS`.
        rule: how answers are compared, see `FolderIndex`.
        answers: the answer vocabulary.
        shuffle: pairs in the shuffle buffer of each process.
        skip: share of the samples that may be broken.
    """

    urls: tuple[str, ...]
    samples: int
    task: str
    rule: str
    answers: tuple[str, ...] = ()
    shuffle: int = 1000
    skip: float = 0.0

    def preview(self) -> Examples:
        """Return the first pairs, as they stand in the first shards.

        Raises:
            CvlmError: there are none, too many are broken, or a shard cannot be read.
        """
        tally = Tally(share=self.skip, expected=self.samples)
        samples = (sample for url in self.urls for sample in read_samples(url))
        pairs = list(islice(sound(self._pairs(samples, tally), tally), PREVIEW))
        if not pairs:
            raise CvlmError(f"the stream {self.urls[0]} ... holds no pair of a picture and a text for task {self.task}")
        return self.examples(pairs)

    def count(self) -> int:
        """Return how many pairs one reading of all shards gives; pictures are not looked at."""
        tally = Tally(share=self.skip, expected=0)
        samples = (sample for url in self.urls for sample in read_samples(url))
        return sum(1 for _ in self._pairs(samples, tally))

    def read(self, seed: int, epoch: int, rank: int, world: int, tally: Tally, known: bool) -> Iterator[StreamPair]:
        """Yield the pairs of one epoch without end, shuffled; pictures are not looked at yet.

        Args:
            seed: with the epoch's number, all that the order depends on.
            epoch: counts from 0.
            rank: which process this is.
            world: how many there are. Shards are shared out among them, or single samples where shards are too few.
            tally: told about every sample.
            known: only pairs whose answer is known.
        """
        from webdataset import shuffle

        for turn in count():
            pairs = self._pairs(self._samples(seed, epoch, turn, rank, world), tally)
            wanted = (pair for pair in pairs if pair.answers or not known)
            # The buffer is emptied at the end of a turn: an epoch of all pairs holds each of them once.
            mix = shuffle(self.shuffle, initial=self.shuffle, rng=Random(f"{seed} {epoch} {turn} {rank}"))
            found = False
            for pair in mix(wanted):
                found = True
                yield pair
            if not found:
                raise CvlmError(f"the shards of process {rank} of {world} hold no pair to train on: {self.urls[0]}")

    def examples(self, pairs: Sequence[StreamPair]) -> Examples:
        """Return pairs as a small split in memory."""
        pictures = {pair.picture.name: pair.picture for pair in pairs}
        place = {name: position for position, name in enumerate(pictures)}
        image_of = np.array([place[pair.picture.name] for pair in pairs], dtype=np.int64)
        texts, text_of = tuple(pair.text for pair in pairs), np.arange(len(pairs), dtype=np.int64)
        labels: Any = image_of
        if self.task != "retrieval":
            texts, text_of = index_texts(texts)
            labels = self._labels([pair.answers for pair in pairs])
        return Examples(
            name=f"stream of {self.urls[0]}",
            split="train",
            pictures=list(pictures.values()),
            texts=texts,
            image_of=image_of,
            text_of=text_of,
            labels=labels,
            answers=self.answers,
        )

    def _labels(self, given: Sequence[tuple[str, ...]]) -> Any:
        if TASKS[self.task].answers:
            return single_labels(given, self.answers)
        # One answer for all people is the whole truth; the rule gives a full score from three people on.
        return SoftLabels.of([one * 3 if len(one) == 1 else one for one in given], self.answers, self.rule)

    def _samples(self, seed: int, epoch: int, turn: int, rank: int, world: int) -> Iterator[RawSample]:
        """Yield this process's samples of one turn through all shards."""
        order = np.random.default_rng([seed, epoch, turn]).permutation(len(self.urls))
        if len(self.urls) >= world:
            order, rank, world = order[rank::world], 0, 1
        yield from islice((sample for i in order for sample in read_samples(self.urls[i])), rank, None, world)

    def _pairs(self, samples: Iterator[RawSample], tally: Tally) -> Iterator[StreamPair]:
        for sample in samples:
            try:
                pairs = pairs_of(sample)
            except CvlmError as error:
                tally.read += 1
                tally.skip(sample.name, f"{sample.name}: {error}")
            else:
                tally.read += len(pairs)
                yield from pairs


def sound(pairs: Iterable[StreamPair], tally: Tally) -> Iterator[StreamPair]:
    """Leave out the pairs whose picture cannot be decoded; what is decoded lives as long as the yielded pair."""
    fresh = (replace(pair, picture=replace(pair.picture)) for pair in pairs)
    return _left(fresh, StreamPicture.load, tally)


def _left(pairs: Iterable[StreamPair], look: Callable[[StreamPicture], Any], tally: Tally) -> Iterator[StreamPair]:
    for pair in pairs:
        try:
            look(pair.picture)
        except CvlmError as error:
            tally.skip(pair.picture.name, str(error))
        else:
            yield pair


@dataclass(frozen=True, kw_only=True)
class StreamOrder:
    """The micro-batches of one process, each a list of decoded pairs; see `EpochOrder` for what is not said here.

    Attributes:
        stream: the shards.
        known: only pairs whose answer is known.
        file: see `Tally`.
    """

    stream: Stream
    seed: int
    batch: int
    batches: int
    rank: int = 0
    world: int = 1
    start: int = 0
    known: bool = False
    file: Path | None = None

    def __iter__(self) -> Iterator[list[StreamPair]]:
        size = len(share_of(self.batch, self.rank, self.world))
        pairs = self._from(self.start * size, math.ceil(self.stream.samples * size / self.batch))
        for _ in range(self.start, self.batches):
            yield list(islice(pairs, size))

    def _from(self, place: int, size: int) -> Iterator[StreamPair]:
        """Yield pairs from a place on in epochs of this size; what was seen of the first is read and checked again."""
        tally = Tally(share=self.stream.skip, expected=size, file=self.file)
        first, seen = divmod(place, size)
        for epoch in count(first):
            pairs = self.stream.read(self.seed, epoch, self.rank, self.world, tally, self.known)
            deque(islice(_left(pairs, StreamPicture.check, tally), seen), maxlen=0)
            yield from islice(sound(pairs, tally), size - seen)
            seen = 0
