"""The measurement of alignment: random maps are wrong and nothing else, and what is measured is what it is called."""

import json
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from PIL import Image, ImageDraw

from benchmarks.alignment.__main__ import main
from benchmarks.alignment.arms import RandomMaps, save_text_encoder
from benchmarks.alignment.measures import divergence, measure, noun_attention, object_shares
from cvlm.config import TextSpec
from cvlm.data import Examples, PictureFile
from cvlm.encoders import load_text_encoder
from distill.alignment import image_units
from distill.layout import ImageLayout, TextLayout
from distill.objectives.attention import CrossAttention
from distill.signal import Signal

TEXTS = ("what is the red shape?", "is there a circle?")
SPANS = {  # words, and words in two pieces behind a special token
    "words": [
        [(0, 4), (5, 7), (8, 11), (12, 15), (16, 21), (21, 22)],
        [(0, 2), (3, 8), (9, 10), (11, 17), (17, 18), (0, 0)],
    ],
    "pieces": [
        [(0, 0), (0, 4), (5, 7), (8, 11), (12, 15), (16, 18), (18, 21), (21, 22)],
        [(0, 0), (0, 2), (3, 8), (9, 10), (11, 14), (14, 17), (17, 18), (0, 0)],
    ],
}


def signal(spans: str, image: ImageLayout, seed: int) -> Signal:
    text = TextLayout(spans=torch.tensor(SPANS[spans]))
    scores = torch.randn(2, 3, text.spans.shape[1], image.tokens, generator=torch.Generator().manual_seed(seed))
    return Signal(logits=torch.eye(2), text_to_image=(2 * scores).softmax(-1), text_layout=text, image_layout=image)


STUDENT = signal("pieces", ImageLayout(grid=(5, 5)), 0)
TEACHER = signal("words", ImageLayout(grid=(6, 6), special=1), 1)


def test_shuffled_units_keep_shape_and_sums_and_lose_their_place():
    units = torch.tensor([[[1, 1, 0, 0, 0], [0, 0, 1, 0, 0], [0, 0, 0, 1, 0], [0, 0, 0, 0, 0]]]).float()
    maps = RandomMaps(seed=2, weight=1.0)
    shuffled = maps.shuffle(units)
    assert not torch.equal(shuffled, units)
    assert sorted(shuffled[0].tolist()) == sorted(units[0].tolist())
    assert (shuffled[0, 3] == 0).all()  # what an example does not have stays behind
    assert torch.equal(shuffled.sum(1), units.sum(1))
    assert torch.equal(maps.shuffle(units.expand(3, -1, -1)), shuffled.expand(3, -1, -1))


def test_a_student_that_looks_where_the_teacher_does_is_wrong_under_random_maps():
    true, _ = CrossAttention()(TEACHER, TEACHER)
    random, count = RandomMaps(seed=0, weight=1.0)(TEACHER, TEACHER)
    assert float(true) == pytest.approx(0, abs=1e-6)
    assert float(random / count) > 0.1


def test_divergence_is_what_cross_attention_minimises():
    total, count = CrossAttention()(STUDENT, TEACHER)
    assert float(divergence(STUDENT, TEACHER).mean()) == pytest.approx(float(total / count), rel=1e-5)
    torch.testing.assert_close(divergence(TEACHER, TEACHER), torch.zeros(2), atol=1e-6, rtol=0)


@pytest.mark.parametrize(
    ("signal", "other", "rows"), [(STUDENT, TEACHER, [[5, 6], [4, 5]]), (TEACHER, STUDENT, [[4], [3]])]
)
def test_the_noun_looks_where_its_tokens_look(signal, other, rows):
    found = noun_attention(signal, other, TEXTS)
    assert found.shape == (2, 25)
    attention = next(iter(signal.text_to_image.values())).mean(1)
    cells = image_units(signal.image_layout, other.image_layout)[0]
    for example, tokens in enumerate(rows):
        seen = cells @ attention[example, tokens].mean(0)
        torch.testing.assert_close(found[example], seen / seen.sum())


@pytest.fixture
def examples(tmp_path) -> Examples:
    """A square that fills one cell of 5 x 5, and one on the corner of four cells."""
    for name, corner in (("a", 40), ("b", 30)):
        picture = Image.new("RGB", (100, 100), (240, 230, 250))
        ImageDraw.Draw(picture).rectangle((corner, corner, corner + 19, corner + 19), fill=(200, 0, 0))
        picture.save(tmp_path / f"{name}.png")
    own = np.arange(2)
    return Examples(
        name="squares",
        split="test",
        pictures=[PictureFile(tmp_path / "a.png"), PictureFile(tmp_path / "b.png")],
        texts=TEXTS,
        image_of=own,
        text_of=own,
        labels=own,
        answers=("red", "no"),
    )


def test_the_object_stands_where_it_was_drawn(examples):
    shares = object_shares(examples, (5, 5)).view(2, 5, 5)
    assert shares[0].nonzero().tolist() == [[2, 2]]
    torch.testing.assert_close(shares[1, 1:3, 1:3], torch.full((2, 2), 0.25))
    torch.testing.assert_close(shares.sum((1, 2)), torch.ones(2))


def test_a_student_that_points_is_told_from_one_that_does_not(examples):
    grid = ImageLayout(grid=(5, 5))
    cell = torch.tensor([12, 0])  # the middle, where the first object stands; the corner, where none does
    maps = torch.full((2, 1, 8, 25), 0.01)
    maps[torch.arange(2), :, :, cell] = 0.76
    student = Signal(
        logits=torch.eye(2),
        text_to_image=maps,
        text_layout=TextLayout(spans=torch.tensor(SPANS["pieces"])),
        image_layout=grid,
    )
    found = measure([student], [TEACHER], examples)
    assert found["accuracy"].tolist() == [1, 1]
    assert found["pointing"].tolist() == [1, 0]
    assert found["mass_on_object"] == pytest.approx([0.76, 0.04])


def test_the_text_encoder_cuts_words_that_the_teacher_does_not(tmp_path):
    save_text_encoder(tmp_path / "text", TEXTS * 3)
    encoder = load_text_encoder(TextSpec(name=f"hf:{tmp_path / 'text'}", train="full"))
    layout = encoder(**encoder.prepare(["is there a rectangle?"])).layout
    pieces = [span for span in layout.spans[0].tolist() if 11 <= span[0] < span[1] <= 20]
    assert len(pieces) > 1
    assert (pieces[0][0], pieces[-1][1]) == (11, 20)


@pytest.mark.slow
def test_the_command_writes_every_arm_and_comparison(tmp_path, monkeypatch):
    arguments = ["--train", "64", "--test", "32", "--epochs", "0.1", "--labelled", "0.5", "--seeds", "0", "1"]
    monkeypatch.setattr("sys.argv", ["alignment", *arguments, "--out", str(tmp_path / "r.json")])
    main()
    result = SimpleNamespace(**json.loads((tmp_path / "r.json").read_text()))
    assert (result.n, result.seeds, result.grid) == (32, [0, 1], [5, 5])
    assert len(result.arms) == 7
    assert all(len(metric["per_seed"]) == 2 for arm in result.arms.values() for metric in arm.values())
    assert all({"verdict", "pointing"} <= comparison.keys() for comparison in result.comparisons.values())
