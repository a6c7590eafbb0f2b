"""Pairs for image-text matching: every caption once right and once wrong, and never wrong by mistake."""

from pathlib import Path

import numpy as np
import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from cvlm.config import JsonLinesData, OpenMojiData
from cvlm.data import UNLABELLED, Examples, PictureFile, load_data
from cvlm.data.matching import MATCH, MISMATCH, matching_pairs
from cvlm.errors import CvlmError
from cvlm.tasks import TASKS


def captions(image_of: list[int], group_of: list[int], texts: list[str] | None = None) -> Examples:
    """One caption per entry of `image_of`; `group_of` is by picture."""
    n = len(image_of)
    return Examples(
        name="by hand",
        split="train",
        pictures=[PictureFile(Path(f"{i}.png")) for i in range(len(group_of))],
        texts=tuple(texts if texts is not None else (f"caption {i}" for i in range(n))),
        image_of=np.array(image_of),
        text_of=np.arange(n),
        labels=np.array([group_of[i] for i in image_of]),
        types=("t",) * n,
        ids=tuple(str(i) for i in range(n)),
    )


@st.composite
def splits(draw: st.DrawFn) -> Examples:
    pictures = draw(st.integers(2, 9))
    groups = draw(st.lists(st.integers(0, pictures), min_size=pictures, max_size=pictures))
    image_of = draw(st.lists(st.integers(0, pictures - 1), min_size=2, max_size=30))
    texts = [f"wording {draw(st.integers(0, 4))}" if draw(st.booleans()) else f"caption {i}" for i in image_of]
    return captions(image_of, groups, texts)


@given(splits())
@settings(max_examples=60, deadline=None)
def test_one_right_and_one_wrong_pair_per_caption(data: Examples) -> None:
    groups = {int(label) for label in data.labels}
    said_of: dict[str, set[int]] = {}
    for text, label in zip(data.texts, data.labels, strict=True):
        said_of.setdefault(text, set()).add(int(label))
    assume(all(found < groups for found in said_of.values()))  # else it is refused, see below
    pairs, n = matching_pairs(data), len(data)
    assert len(pairs) == 2 * n
    assert pairs.labels.tolist() == [MATCH] * n + [MISMATCH] * n
    assert np.array_equal(pairs.image_of[:n], data.image_of)
    assert np.array_equal(pairs.text_of, np.tile(data.text_of, 2))
    group = dict(zip(data.image_of.tolist(), data.labels.tolist(), strict=True))
    said = {(data.texts[t], i) for t, i in zip(data.text_of, data.image_of, strict=True)}
    for text, wrong, right in zip(data.text_of, pairs.image_of[n:], data.image_of, strict=True):
        assert group[int(wrong)] != group[int(right)]
        assert (data.texts[text], wrong) not in said, "somebody captioned this picture so"
    assert len(set(pairs.ids)) == 2 * n
    assert pairs.answers == TASKS["itm"].answers == ("no", "yes")
    assert np.array_equal(matching_pairs(data).image_of, pairs.image_of)


def test_wrong_pictures_are_drawn_evenly() -> None:
    data = captions([0] * 3000 + [1, 2, 3], group_of=[0, 1, 2, 0])
    wrong = matching_pairs(data).image_of[3003:6003]
    assert set(wrong.tolist()) == {1, 2}, "picture 3 is of picture 0's group"
    assert np.mean(wrong == 1) == pytest.approx(0.5, abs=0.04)  # four standard deviations


def test_a_picture_of_the_same_wording_is_never_wrong() -> None:
    data = captions([0, 1, 2] * 20, group_of=[0, 1, 2], texts=["a dog", "a dog", "a cat"] * 20)
    wrong = matching_pairs(data).image_of[60:]
    assert all(picture == 2 for picture, text in zip(wrong, data.texts, strict=True) if text == "a dog")
    assert set(wrong[2::3].tolist()) == {0, 1}


def test_pictures_without_a_group_stand_alone() -> None:
    data = captions([0, 1], group_of=[UNLABELLED, UNLABELLED])
    assert matching_pairs(data).image_of.tolist() == [0, 1, 1, 0]


def test_one_group_is_refused() -> None:
    with pytest.raises(CvlmError, match="the train split of by hand shows one group of pictures; matching needs wrong"):
        matching_pairs(captions([0, 1, 1], group_of=[5, 5]))


def test_a_caption_of_every_picture_is_refused() -> None:
    with pytest.raises(CvlmError, match="the caption 'a photo' stands with every picture of the train split"):
        matching_pairs(captions([0, 1, 2, 0], group_of=[0, 1, 2], texts=["a photo"] * 3 + ["a dog"]))


def test_retrieval_data_serves_matching(tmp_path: Path, paint) -> None:
    for name, colour in (("a", (200, 0, 0)), ("b", (0, 0, 200))):
        paint(name, colour)
    lines = "\n".join(f'{{"image": "{name}.png", "text": "it is {name}"}}' for name in "ab")
    for split in ("train", "test"):
        (tmp_path / f"{split}.jsonl").write_text(lines)
    splits = load_data(JsonLinesData(kind="jsonl", path=tmp_path), "itm")
    assert splits.test.image_of.tolist() == [0, 1, 1, 0]
    assert splits.train.labels.tolist() == [MATCH, MATCH, MISMATCH, MISMATCH]


def test_openmoji_serves_matching() -> None:
    splits = load_data(OpenMojiData(kind="openmoji", limit=12), "itm")
    assert (len(splits.train), len(splits.test)) == (24, 24)
