"""The order of training pairs: a pure function of seed and epoch, the same for any number of processes."""

from itertools import chain

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from cvlm.data.order import EpochOrder, share_of


def make(pairs: int = 23, seed: int = 4, batch: int = 6, batches: int = 20, **where: int) -> EpochOrder:
    return EpochOrder(index=np.arange(pairs) * 10, seed=seed, batch=batch, batches=batches, **where)


def read(order: EpochOrder) -> list[list[int]]:
    return [part.tolist() for part in order]


@given(
    pairs=st.integers(1, 40), batch=st.integers(1, 12), batches=st.integers(1, 15), data=st.data(), seed=st.integers(0)
)
def test_any_number_of_processes_sees_the_same_pairs_in_every_micro_batch(pairs, batch, batches, data, seed):
    world, start = data.draw(st.integers(1, batch)), data.draw(st.integers(0, batches))
    settings = {"pairs": pairs, "seed": seed, "batch": batch, "batches": batches}
    alone = read(make(**settings))
    parts = [read(make(**settings, rank=rank, world=world, start=start)) for rank in range(world)]
    assert {len(part) for part in parts} == {batches - start}, "equal steps on every process"
    joined = [list(chain.from_iterable(together)) for together in zip(*parts, strict=True)]
    assert joined == alone[start:]
    assert max(map(len, chain(*parts)), default=0) - min(map(len, chain(*parts)), default=0) <= 1


def test_every_epoch_holds_every_pair_once_in_an_order_of_its_own():
    order = make(pairs=23, batch=6, batches=23)
    seen = np.concatenate(list(order))
    epochs = seen.reshape(6, 23)
    assert (np.sort(epochs, axis=1) == np.arange(23) * 10).all()
    assert len({tuple(epoch) for epoch in epochs.tolist()}) == 6
    assert epochs[2].tolist() == order.epoch(2).tolist()


def test_seeds_share_no_epoch():
    # Not so if seed and epoch were added up: epoch 1 of seed 0 would be epoch 0 of seed 1.
    orders = {tuple(make(seed=seed).epoch(epoch)) for seed in range(4) for epoch in range(4)}
    assert len(orders) == 16


@pytest.mark.parametrize(("batch", "world"), [(7, 3), (8, 8), (5, 1)])
def test_shares_cover_a_batch_once(batch, world):
    assert list(chain.from_iterable(share_of(batch, rank, world) for rank in range(world))) == list(range(batch))


def test_a_process_without_a_share_is_refused():
    with pytest.raises(ValueError, match="a micro-batch of 2 cannot be shared out to process 0/3"):
        make(batch=2, world=3)
    with pytest.raises(ValueError, match="no pair"):
        make(pairs=0)
