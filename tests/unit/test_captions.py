"""Captions as data: words, vocabulary, hidden captions, and the splits that load_data makes of retrieval data."""

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from cvlm.config import JsonLinesData, parse_recipe
from cvlm.data import CaptionWords, Examples, Splits, captions_of_pictures, load_data
from cvlm.data.captions import caption_splits
from cvlm.data.words import build_words, default_min_count, split_words
from cvlm.errors import CvlmError
from cvlm.tasks import END, SPECIAL_WORDS, UNKNOWN

Pairs = Callable[..., Examples]


@pytest.mark.parametrize(
    ("caption", "words"),
    [
        ("A red CAR, parked.", ["a", "red", "car", "parked"]),
        ("the dog\u2019s two-year-old U.S. flag", ["the", "dog's", "two-year-old", "u.s", "flag"]),
        ("3.5 m _high_ -- caf\u00e9!", ["3.5", "m", "high", "caf\u00e9"]),
        ("?!", []),
    ],
)
def test_how_captions_are_split(caption: str, words: list[str]) -> None:
    found = split_words(caption)
    assert [word for word, _, _ in found] == words
    assert [caption[start:end].lower().replace("\u2019", "'") for _, start, end in found] == words


def test_the_vocabulary_by_hand() -> None:
    captions = ["a red car", "a car", "A blue boat.", "car <end>"]
    assert build_words(captions, min_count=2) == (*SPECIAL_WORDS, "a", "car")
    assert build_words(captions) == (*SPECIAL_WORDS, "a", "car", "blue", "boat", "end", "red")
    assert [default_min_count(n) for n in (1, 199, 200, 6000, 99_999, 100_000, 600_000)] == [1, 1, 2, 2, 2, 5, 5]
    with pytest.raises(CvlmError, match="no word occurs 3 times in the 2 training captions"):
        build_words(["one two", "two"], min_count=3)


class TestWords:
    VOCABULARY = (*SPECIAL_WORDS, "a", "red", "car")
    CAPTIONS = ("a red car", "a boat", "", "car")

    def test_rows(self) -> None:
        words = CaptionWords.of(self.CAPTIONS, self.VOCABULARY)
        assert words[np.array([1, 0])].tolist() == [[3, UNKNOWN, END, -100], [3, 4, 5, END]]
        assert words[np.array([2, 3])].tolist() == [[END, -100], [5, END]]
        assert words[3].tolist() == [5, END]
        assert len(words) == 4

    def test_a_hidden_caption_has_no_words(self) -> None:
        words = CaptionWords.of(self.CAPTIONS, self.VOCABULARY).hide_all_but(np.array([3]))
        everything = np.arange(4)
        assert words[everything].tolist() == [[-100, -100]] * 3 + [[5, END]]
        shown = words.inputs(everything)
        assert (shown["words"][:3] == -100).all()
        assert shown["spans"].tolist() == [[[0, 0]] * 2] * 3 + [[[0, 3], [0, 0]]]
        assert words.inputs(np.array([0]))["words"].tolist() == [[-100]]

    def test_the_first(self) -> None:
        words = CaptionWords.of(self.CAPTIONS, self.VOCABULARY)
        assert words.first(2)[np.arange(2)].tolist() == words[np.arange(2)].tolist()


def test_splits(colour_pairs: Pairs) -> None:
    splits = caption_splits(Splits(train=colour_pairs(8, "train"), test=colour_pairs(6)))
    train = splits.train
    assert splits.test.answers == train.answers
    assert train.answers[:5] == (*SPECIAL_WORDS, "is", "picture")
    said = [train.answers[word] for word in train.labels[0].tolist()]  # type: ignore[union-attr]
    assert said == ["picture", "0", "is", "red", "<end>"]
    assert train.labelled.tolist() == list(range(8))
    few = train.hide_labels(0.25, seed=0)
    assert len(few.labelled) == 2
    assert (few.labels[0] >= 0).any() == (0 in few.labelled)
    short = train.limit(3)
    assert short.labels[np.arange(3)].tolist() == train.labels[np.arange(3)].tolist()
    # A vocabulary of words is how a model reads a split, and no part of the split.
    other = caption_splits(splits, (*SPECIAL_WORDS, "picture"))
    assert other.train.fingerprint == train.fingerprint
    assert replace(train, texts=(*train.texts[:-1], "x")).fingerprint != train.fingerprint


def test_all_captions_of_a_picture_are_references(colour_pairs: Pairs) -> None:
    data = replace(colour_pairs(4), image_of=np.array([2, 0, 2, 3]))
    found = captions_of_pictures(data)
    assert list(found) == [0, 2, 3]
    assert found[2] == [data.texts[0], data.texts[2]]


def lines(folder: Path, paint: Callable[..., Any]) -> Path:
    for split in ("train", "test"):
        rows = [{"image": paint(f"{split}{i}", (i, i, i)).path.name, "text": f"a thing {i % 2}"} for i in range(4)]
        (folder / f"{split}.jsonl").write_text("\n".join(map(json.dumps, rows)), encoding="utf-8")
    return folder


def test_a_folder_of_the_users_own(tmp_path: Path, paint: Callable[..., Any]) -> None:
    spec = JsonLinesData(kind="jsonl", path=lines(tmp_path, paint))
    assert load_data(spec, "captioning").train.answers == (*SPECIAL_WORDS, "a", "thing", "0", "1")
    words = (*SPECIAL_WORDS, "thing")
    given = load_data(spec.model_copy(update={"answers": words}), "captioning")
    assert given.test.answers == words
    assert given.test.labels[0].tolist() == [UNKNOWN, 3, UNKNOWN, END]  # type: ignore[union-attr]
    with pytest.raises(CvlmError, match="begins with <unk>, <start>, <end>, not thing"):
        load_data(spec.model_copy(update={"answers": ("thing", "a")}), "captioning")


@pytest.mark.parametrize(
    ("labelled", "pairs", "refused"), [(0.5, "all", True), (1.0, "all", False), (0.5, "labelled", False)]
)
def test_a_recipe_that_would_read_hidden_captions(labelled: float, pairs: str, refused: bool) -> None:
    phase = {"objectives": ["labels"], "pairs": pairs}
    tower = {"name": "package:x"}
    raw = {
        "task": "captioning",
        "data": {"kind": "shards", "path": "x", "labelled": labelled},
        "student": {"vision": tower, "text": tower},
        "phases": {"finetune": phase},
    }
    if refused:
        with pytest.raises(CvlmError, match=r"finetune: pairs: all would read captions that data\.labelled hides"):
            parse_recipe(raw)
    else:
        assert parse_recipe(raw).task == "captioning"
