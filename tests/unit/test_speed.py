"""The speed measurements on small sizes: they run, the two ways agree, and the file says what was measured."""

import json
import sys
from pathlib import Path

import numpy as np
import pytest

from benchmarks.speed import import_shards, reading, recall, vqa
from benchmarks.speed.__main__ import main
from benchmarks.speed.timing import peak_growth, time_pair


def test_vqa() -> None:
    measured = vqa.compare(questions=300, repeats=2)
    assert measured["size"]["questions"] == 300
    assert len(measured["seconds"]["ours"]) == len(measured["seconds"]["reference"]) == 2
    times = measured["times_faster"]
    assert 0 < times["min"] <= times["median"] <= times["max"]


def test_answers_repeat_as_real_ones_do() -> None:
    annotations, results = vqa.make_split(2000)
    people = [[answer["answer"] for answer in item["answers"]] for item in annotations.values()]
    assert all(len(answers) == 10 for answers in people)
    assert 1000 < len({answer for answers in people for answer in answers}) < 4000
    unanimous = np.mean([len(set(answers)) == 1 for answers in people])
    assert 0.1 < unanimous < 0.5
    assert set(results) == set(annotations)


@pytest.mark.skipif(sys.platform != "linux", reason="the kernel states the peak on Linux only")
def test_recall_writes_its_file(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    pytest.importorskip("clip_benchmark")
    arguments = ["recall", "--images", "300", "--repeats", "1", "--out", str(tmp_path / "speed")]
    monkeypatch.setattr(sys, "argv", ["speed", *arguments])
    main()
    measured = json.loads((tmp_path / "speed" / "recall.json").read_text())
    assert measured["size"] == {"images": 300, "texts": 1500, "width": 512}
    assert measured["memory_share"] < 0.5
    assert {"date", "machine", "versions", "beside", "equal"} <= set(measured)
    assert capsys.readouterr().out.startswith("recall: ")


def test_import(tmp_path: Path) -> None:
    measured = import_shards.compare(pictures=60, repeats=1)
    assert measured["size"]["pictures"] == 60
    assert 40_000 < measured["size"]["bytes"] / 60 < 120_000, "as large as photos are"
    files = sorted((import_shards.make_source(tmp_path / "source", 60) / "images").iterdir())
    assert len({path.read_bytes() for path in files}) == 60, "no two files are equal"


def test_unknown_work(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr(sys, "argv", ["speed", "imports"])
    with pytest.raises(SystemExit):
        main()
    assert "unknown work imports; there is vqa, recall" in capsys.readouterr().err


def test_a_difference_between_the_ways_is_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(vqa, "evaluate", lambda gts, res: [0.5] * len(gts))
    with pytest.raises(AssertionError, match="the two ways disagree"):
        vqa.compare(questions=20, repeats=1)
    monkeypatch.setattr(recall, "reference_recall", lambda *data: {"text_to_image_recall@1": 2.0})
    with pytest.raises(AssertionError, match="the two ways disagree in text_to_image_recall@1"):
        recall.compare(images=20, repeats=1)


def test_a_picture_that_is_lost_is_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(import_shards, "plain_loop", lambda source, out: out.mkdir())
    with pytest.raises(AssertionError, match="the two ways disagree"):
        import_shards.compare(pictures=2, repeats=1)


def test_time_pair_prepares_outside_the_clock() -> None:
    calls: list[str] = []

    def prepare(name: str):
        calls.append(f"prepare {name}")
        return lambda: calls.append(name)

    timing = time_pair(lambda: prepare("ours"), lambda: prepare("reference"), 2)
    assert calls == ["prepare ours", "ours", "prepare reference", "reference"] * 2
    assert timing["repeats"] == 2


@pytest.mark.skipif(sys.platform != "linux", reason="the kernel states the peak on Linux only")
def test_peak_growth_sees_memory_that_is_freed_again() -> None:
    grown = peak_growth(lambda: np.ones(50_000_000 // 8).sum())
    assert grown > 45_000_000


def test_reading() -> None:
    measured = reading.compare(samples=40, repeats=1)
    assert measured["size"]["samples"] == 40
    assert measured["without_decoding"]["seconds"]["ours"][0] < measured["seconds"]["ours"][0]
    assert {"date", "machine", "versions", "beside", "equal"} <= set(measured)
