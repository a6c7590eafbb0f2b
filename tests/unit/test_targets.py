"""Stored targets: what comes back, kills at every moment, refusals, and the same loss as from the live teacher."""

import json
from dataclasses import replace

import numpy as np
import pytest
import torch

from distill.errors import DistillError
from distill.layout import ImageLayout, TextLayout
from distill.objectives import build_objective
from distill.signal import Request, Signal
from distill.store import ArrayStore
from distill.targets import TargetStore, storable

PAIRS, ROOM, HEADS, ANSWERS, WIDTH = 11, 22, 3, 19, 32
IMAGE = ImageLayout(grid=(4, 5), special=1)
LENGTHS = [5, 9, 0, 3, 9, 7, 1, 16, 2, 4, 6]  # words per text


def signal(rows, layers=(0, 2)) -> Signal:
    """What a joint teacher says about some pairs, padded to their longest text: class token, words, separator."""
    n = max(LENGTHS[i] for i in rows) + 2
    spans = torch.zeros(len(rows), n, 2, dtype=torch.long)
    keep = torch.zeros(len(rows), n, dtype=torch.bool)
    for row, i in enumerate(rows):
        for word in range(LENGTHS[i]):
            spans[row, 1 + word] = torch.tensor([3 * word, 3 * word + 2])
        keep[row, : LENGTHS[i] + 2] = True

    def noise(name, i, *shape):
        # Made for the longest text and cut, so that a pair says the same in whatever batch it stands.
        seed = 1000 * i + sum(map(ord, name))
        return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))

    def stack(name, *shape):
        return torch.stack([noise(name, i, *shape) for i in rows])

    to_image, to_text, hidden = {}, {}, {}
    for layer in layers:
        to_image[layer] = (2 * stack(f"a{layer}", HEADS, ROOM, IMAGE.tokens))[:, :, :n].softmax(-1)
        scores = (2 * stack(f"b{layer}", HEADS, IMAGE.tokens, ROOM))[..., :n]
        for row, i in enumerate(rows):
            # Much, and in every row a different part of the mass, on the separator: as trained models do.
            scores[row, :, :, LENGTHS[i] + 1] += 3.0
        to_text[layer] = scores.masked_fill(~keep[:, None, None, :], float("-inf")).softmax(-1)
        hidden[layer] = stack(f"c{layer}", ROOM, WIDTH)[:, :n]
    return Signal(
        logits=stack("logits", ANSWERS),
        pooled=stack("pooled", WIDTH),
        text_to_image=to_image,
        image_to_text=to_text,
        hidden=hidden,
        text_layout=TextLayout(spans=spans),
        image_layout=IMAGE,
    )


def open_store(folder, fingerprint="f" * 64, text_length=ROOM):
    return TargetStore(folder, pairs=PAIRS, fingerprint=fingerprint, text_length=text_length)


def fill(store, batch=4, start=None):
    """What `store_targets` does."""
    for first in range(store.done if start is None else start, PAIRS, batch):
        store.write(first, signal(range(first, min(first + batch, PAIRS))))
    store.finish()
    return store


def everything(store):
    return store.take(np.arange(PAIRS))


def assert_same(one: Signal, other: Signal):
    assert one.fields == other.fields
    for name in ("logits", "pooled", "text_to_image", "image_to_text", "hidden"):
        torch.testing.assert_close(getattr(one, name), getattr(other, name), atol=0, rtol=0)
    assert torch.equal(one.text_layout.spans, other.text_layout.spans)
    assert one.image_layout == other.image_layout


# ---- round trip ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("batch", [1, 4, PAIRS])
def test_what_was_written_comes_back(tmp_path, batch):
    store = fill(open_store(tmp_path), batch)
    assert store.done == PAIRS
    rows = [7, 0, 2, 4]
    found, live = store.take(np.array(rows)), signal(rows)
    n = LENGTHS[7] + 2  # up to the separator of the longest text, which takes attention
    assert torch.equal(found.logits, live.logits)
    assert torch.equal(found.pooled, live.pooled)
    assert found.image_layout == IMAGE
    assert torch.equal(found.text_layout.spans, live.text_layout.spans[:, :n])
    assert set(found.text_to_image) == set(found.image_to_text) == set(found.hidden) == {0, 2}
    for layer in (0, 2):
        own = live.text_layout.words
        assert torch.equal(found.hidden[layer][own], live.hidden[layer][own])
        for name in ("text_to_image", "image_to_text"):
            mean = getattr(live, name)[layer].mean(1, keepdim=True)
            assert getattr(found, name)[layer].dtype == torch.float32
            # Half precision keeps 11 bits; scaling rows back to one adds as much again.
            words = own[:, None, :, None] if name == "text_to_image" else own[:, None, None, :]
            expected, got = (torch.where(words, x, 0.0) for x in (mean, getattr(found, name)[layer]))
            torch.testing.assert_close(got, expected, rtol=2**-10, atol=2**-23)
        torch.testing.assert_close(found.text_to_image[layer].sum(-1)[own[:, None]].mean(), torch.tensor(1.0))
        torch.testing.assert_close(found.image_to_text[layer].sum(-1), torch.ones(4, 1, IMAGE.tokens))


def test_a_pair_says_the_same_in_whatever_company(tmp_path):
    """Short texts are cut to the longest of the batch that is taken; nothing but padding may go."""
    store = fill(open_store(tmp_path))
    whole = everything(store)
    for rows in ([3], [6, 2], [2], [1, 4], [10, 0, 9]):
        found = store.take(np.array(rows))
        n = found.text_layout.spans.shape[1]
        assert n == max(LENGTHS[i] for i in rows) + 2
        for layer in (0, 2):
            assert torch.equal(found.image_to_text[layer], whole.image_to_text[layer][rows][..., :n])
            assert torch.equal(found.text_to_image[layer], whole.text_to_image[layer][rows][:, :, :n])


def test_projections_and_top_answers_come_back(tmp_path):
    rows = list(range(PAIRS))
    whole = signal(rows)
    values = {1: torch.randn(PAIRS, whole.text_layout.spans.shape[1], WIDTH)}
    top = (torch.randn(PAIRS, 4).log_softmax(-1), torch.randint(ANSWERS, (PAIRS, 4)))
    store = open_store(tmp_path)
    store.write(0, replace(whole, values=values, top_logits=top))
    store.finish()
    found = open_store(tmp_path).take(np.array([5, 1]))
    words = whole.text_layout.words[[5, 1], : found.text_layout.spans.shape[1]]
    assert torch.equal(found.values[1][words], values[1][[5, 1], : words.shape[1]][words])
    assert torch.equal(found.top_logits[0], top[0][[5, 1]])
    assert torch.equal(found.top_logits[1], top[1][[5, 1]])
    assert found.queries is None


def test_what_can_be_stored():
    assert storable(Request(fields=frozenset({"logits", "text_to_image", "values"})))
    assert not storable(Request(fields=frozenset({"logits", "similarity"})))
    assert not storable(Request(fields=frozenset({"text_to_image"}), per_head=True))


def test_only_what_was_given_is_stored(tmp_path):
    store = open_store(tmp_path)
    store.write(0, Signal(logits=torch.ones(PAIRS, ANSWERS, requires_grad=True)))
    store.finish()
    assert sorted(path.name for path in tmp_path.iterdir()) == ["done.json", "logits.npy", "meta.json"]
    assert everything(store).fields == {"logits"}


def test_no_pickle_is_needed(tmp_path):
    fill(open_store(tmp_path))
    for path in tmp_path.glob("*.npy"):
        assert np.load(path, allow_pickle=False).dtype != object


# ---- the same loss ---------------------------------------------------------------------------------------------------


def student(rows) -> Signal:
    """Characters as tokens, a finer grid: nothing fits without alignment."""
    text = TextLayout(
        spans=torch.tensor(
            [[(i, i + 1) if i % 3 < 2 and i // 3 < LENGTHS[row] else (0, 0) for i in range(48)] for row in rows]
        )
    )
    image = ImageLayout(grid=(3, 3), special=2)
    generator = torch.Generator().manual_seed(17)
    shape = len(rows), 5
    return Signal(
        text_to_image=torch.randn(*shape, 48, image.tokens, generator=generator).softmax(-1),
        image_to_text=torch.randn(*shape, image.tokens, 48, generator=generator).softmax(-1),
        text_layout=text,
        image_layout=image,
    )


@pytest.mark.parametrize("rows", [[7, 0, 2, 4], [3], [10, 9, 8, 6, 5, 1]])
@pytest.mark.parametrize("directions", ["text_to_image", "image_to_text"])
def test_attention_loss_from_stored_targets_equals_the_live_one(tmp_path, rows, directions):
    store = fill(open_store(tmp_path))
    objective = build_objective("cross_attention", layers=[[0, 2]], directions=directions)
    stored, count = objective(student(rows), store.take(np.array(rows)))
    live, expected_count = objective(student(rows), signal(rows))
    assert count == expected_count
    # d KL = sum dt (log(t / s) + 1). Rounding to half and rescaling change every t by at most 2^-10 of itself, and
    # |log(t / s)| stays below 6 for these maps; so a row changes by at most 7 * 2^-10, or 0.007.
    assert (stored - live).abs() < len(rows) * 7 * 2**-10
    assert live > 0.1 * count
    # Rounding errors have either sign and nearly cancel: a wrong scale of rows, by contrast, shows at once.
    torch.testing.assert_close(stored, live, rtol=1e-3, atol=1e-4)


def test_logits_and_hidden_losses_are_exactly_the_live_ones(tmp_path):
    store, rows = fill(open_store(tmp_path)), [1, 7, 3]
    ours = Signal(
        logits=torch.zeros(3, ANSWERS), hidden={0: torch.ones(3, 48, 16)}, text_layout=student(rows).text_layout
    )
    for objective in (build_objective("logits"), build_objective("hidden", layers=[[0, 0]])):
        objective.prepare(ours, signal(rows))
        torch.testing.assert_close(objective(ours, store.take(np.array(rows)))[0], objective(ours, signal(rows))[0])


# ---- kills -----------------------------------------------------------------------------------------------------------


class Killed(BaseException):
    """Not an Exception, as little as a signal is: nothing may catch it."""


@pytest.mark.parametrize("moment", range(8))
def test_a_kill_at_any_moment_leaves_a_store_that_can_be_finished(tmp_path, moment, monkeypatch):
    """Dies before or behind each mark: those of three batches, and the one of a complete store."""
    reference = everything(fill(open_store(tmp_path / "whole")))
    replace, calls = ArrayStore._replace, iter(range(100))

    def dying(self, name, value):
        call = next(calls)
        if call == moment // 2 and moment % 2:
            replace(self, name, value)
        if call == moment // 2:
            raise Killed
        replace(self, name, value)

    monkeypatch.setattr(ArrayStore, "_replace", dying)
    with pytest.raises(Killed):
        fill(open_store(tmp_path / "killed"))
    monkeypatch.undo()
    again = open_store(tmp_path / "killed")
    assert again.store.complete == (moment == 7)
    if moment < 7:
        with pytest.raises(DistillError, match="are incomplete; build them again"):
            everything(again)
        again = fill(again, batch=3)  # other batches than before
    assert_words_same(everything(again), reference)


def assert_words_same(one: Signal, other: Signal):
    """Equal where a token is kept; what a batch padded with is nobody's business."""
    assert torch.equal(one.text_layout.spans, other.text_layout.spans)
    words = other.text_layout.words
    assert torch.equal(one.logits, other.logits)
    for layer in (0, 2):
        assert torch.equal(one.hidden[layer][words], other.hidden[layer][words])
        assert torch.equal(one.text_to_image[layer][:, 0][words], other.text_to_image[layer][:, 0][words])
        assert torch.equal(one.image_to_text[layer], other.image_to_text[layer])
    assert one.image_layout == other.image_layout


def test_a_kill_between_arrays_of_one_batch(tmp_path, monkeypatch):
    store = open_store(tmp_path)
    store.write(0, signal(range(4)))
    opened, calls = ArrayStore._open, iter(range(100))

    def dying(self, *args):
        if next(calls) == 3:
            raise Killed
        return opened(self, *args)

    monkeypatch.setattr(ArrayStore, "_open", dying)
    again = open_store(tmp_path)
    with pytest.raises(Killed):
        again.write(4, signal(range(4, 8)))
    monkeypatch.undo()
    assert open_store(tmp_path).done == 4
    assert_same(everything(fill(open_store(tmp_path))), everything(fill(open_store(tmp_path / "whole"))))


def test_when_only_the_end_is_missing_the_last_pair_is_due_again(tmp_path):
    """Grid and fingerprint are known from a signal alone: without one, the store would be closed without them."""
    store = open_store(tmp_path)
    for first in range(0, PAIRS, 4):
        store.write(first, signal(range(first, min(first + 4, PAIRS))))
    again = open_store(tmp_path)
    assert again.done == PAIRS - 1
    with pytest.raises(DistillError, match="cannot be finished: write the pairs from 10 on first"):
        again.finish()
    assert_words_same(everything(fill(again)), everything(fill(open_store(tmp_path / "whole"))))


# ---- refusals --------------------------------------------------------------------------------------------------------


def test_targets_of_another_fingerprint_are_refused(tmp_path):
    fill(open_store(tmp_path))
    with pytest.raises(DistillError, match=r"another teacher, .*fingerprint ffffffffffff, wanted eeeeeeeeeeee.*delete"):
        everything(open_store(tmp_path, fingerprint="e" * 64))


def test_incomplete_targets_are_refused(tmp_path):
    store = open_store(tmp_path)
    assert store.done == 0
    with pytest.raises(DistillError, match="are incomplete; build them again"):
        everything(store)
    store.write(0, signal(range(4)))
    assert store.done == 4
    with pytest.raises(DistillError, match="are incomplete; build them again"):
        everything(store)
    with pytest.raises(DistillError, match="write the pairs from 4 on first"):
        store.finish()


@pytest.mark.parametrize("field", ["similarity", "matching", "answers"])
def test_fields_that_depend_on_the_batch_are_refused(tmp_path, field):
    value = ("a",) * 4 if field == "answers" else torch.zeros(4, 4)
    with pytest.raises(DistillError, match=rf"fields \['{field}'\] cannot be stored; use the teacher live"):
        open_store(tmp_path).write(0, Signal(logits=torch.zeros(4, ANSWERS), **{field: value}))
    assert not any(tmp_path.iterdir())


def test_a_text_without_room_is_refused(tmp_path):
    with pytest.raises(DistillError, match=r"a text of 18 tokens does not fit .* room for 17; raise text_length"):
        open_store(tmp_path, text_length=17).write(4, signal(range(4, 8)))


def test_resuming_with_other_shapes_is_refused(tmp_path):
    """A fresh array would leave zeros in the rows that count as done."""
    open_store(tmp_path).write(0, signal(range(4)))
    with pytest.raises(DistillError, match=r"4 row\(s\) are stored already, but .*\.npy holds .*, not .*; delete the"):
        open_store(tmp_path, text_length=ROOM + 8).write(4, signal(range(4, 8)))
    with pytest.raises(DistillError, match=r"text_to_image-1\.npy is missing, not float16"):
        open_store(tmp_path).write(4, signal(range(4, 8), layers=(0, 1)))
    assert open_store(tmp_path).done == 4
    (tmp_path / "logits.npy").unlink()
    with pytest.raises(DistillError, match=r"logits\.npy is missing"):
        open_store(tmp_path).write(4, signal(range(4, 8)))


# ---- the folder of arrays --------------------------------------------------------------------------------------------


def test_array_store_pads_short_rows_and_reads_only(tmp_path):
    store = ArrayStore(tmp_path, 5)
    shapes = {"a": (18, 2)}
    store.write(0, {"a": np.ones((3, 16, 2), dtype=np.float32)}, shapes)
    assert (store.done, store.complete) == (3, False)
    store.write(3, {"a": np.full((2, 18, 2), 2, dtype=np.float32)}, shapes)
    store.finish({"k": [1, 2]})
    arrays, meta = ArrayStore(tmp_path, 5).read()
    assert meta == {"k": [1, 2]}
    assert arrays["a"].shape == (5, 18, 2)
    assert (arrays["a"][:3, :16] == 1).all()
    assert (arrays["a"][:3, 16:] == 0).all()
    assert (arrays["a"][3:] == 2).all()
    with pytest.raises(ValueError, match="read-only"):
        arrays["a"][0] = 7
    assert json.loads((tmp_path / "done.json").read_text()) == 5
    assert not list(tmp_path.glob("*.part"))
