"""In which order a phase sees its pairs: a pure function of seed and epoch, the same for any number of processes."""

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray


@dataclass(frozen=True, kw_only=True)
class EpochOrder:
    """The micro-batches of one process, in one order without end: the shuffled epochs, one behind the other.

    Micro-batch `m` holds the places `m * batch ... (m + 1) * batch` of that order, whatever runs it, and the processes
    share each micro-batch out among themselves. So an optimiser step sees the same pairs on one process and on ten, all
    processes make equally many steps, no pair is left out of an epoch, and a run can go on anywhere, on any number.

    Attributes:
        index: `[n]` the pairs to train on.
        seed: with the epoch's number, all that its order depends on.
        batch: pairs per micro-batch, over all processes.
        batches: micro-batches of the whole phase.
        rank: which process this is.
        world: how many there are; at most `batch`.
        start: micro-batches that an earlier attempt has done.
    """

    index: NDArray[np.int64]
    seed: int
    batch: int
    batches: int
    rank: int = 0
    world: int = 1
    start: int = 0

    def __post_init__(self) -> None:
        if not len(self.index):
            raise ValueError("there is no pair to put in order")
        if not 0 <= self.rank < self.world <= self.batch:
            raise ValueError(f"a micro-batch of {self.batch} cannot be shared out to process {self.rank}/{self.world}")

    def __iter__(self) -> Iterator[NDArray[np.int64]]:
        places = share_of(self.batch, self.rank, self.world)
        number, epoch = -1, self.index
        for first in range(self.start * self.batch, self.batches * self.batch, self.batch):
            part = []
            for place in range(first + places.start, first + places.stop):
                if place // len(self.index) != number:
                    number = place // len(self.index)
                    epoch = self.epoch(number)
                part.append(epoch[place % len(self.index)])
            yield np.array(part)

    def epoch(self, number: int) -> NDArray[np.int64]:
        """Return `[n]` the pairs of one epoch in their order."""
        return np.random.default_rng([self.seed, number]).permutation(self.index)


def share_of(batch: int, rank: int, world: int) -> range:
    """Return the places in a micro-batch that belong to one process: runs of nearly equal length."""
    return range(rank * batch // world, (rank + 1) * batch // world)
