"""The measurement of fusion retrieval on a small size: it runs, and the file says what was measured."""

import json
import sys
from pathlib import Path

import numpy as np
import pytest

from benchmarks.speed.__main__ import main
from benchmarks.speed.fusion_retrieval import LANGUAGES, make_data


def test_it_writes_its_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("emoji")
    arguments = ["fusion_retrieval", "--fusion-images", "20", "--epochs", "1", "--repeats", "2", "--out", str(tmp_path)]
    monkeypatch.setattr(sys, "argv", ["speed", *arguments])
    main()
    measured = json.loads((tmp_path / "fusion_retrieval.json").read_text())
    pairs = measured["size"]["pairs_scored"]
    assert pairs["reference"] == 20 * 100, "every pair"
    # 16 of 20 pictures for each of 100 texts, and for each picture 16 texts that mostly asked for it too.
    assert 1600 <= pairs["ours"] <= 1600 + 20 * 16
    assert len(measured["seconds"]["ours"]) == len(measured["seconds"]["reference"]) == 2
    recall = measured["recall"]
    assert set(recall) == {"embeddings_alone", "two_stage", "exhaustive"}
    for name, value in recall["exhaustive"].items():
        assert measured["recall_difference"][name] == pytest.approx(recall["two_stage"][name] - value)
    assert {"date", "machine", "versions", "beside"} <= set(measured)


def test_views_differ_and_names_do_not() -> None:
    pytest.importorskip("emoji")
    train, test = make_data(3, "train", (1, 2)), make_data(3, "test", (0,))
    assert train.texts == test.texts
    assert len(train.texts) == 3 * len(LANGUAGES)
    assert (len(train.pictures), len(test.pictures)) == (6, 3)
    assert np.bincount(train.image_of).tolist() == [5] * 6
    assert train.labels[train.image_of == 1].tolist() == [0] * 5, "the second picture shows the first concept too"
    shown = [np.asarray(picture.load()) for picture in (*train.pictures[:2], test.pictures[0])]
    assert len({view.tobytes() for view in shown}) == 3
    assert np.array_equal(shown[0], np.asarray(train.pictures[0].load())), "a view stays as it is"
    assert len({picture.key for picture in (*train.pictures, *test.pictures)}) == 9
