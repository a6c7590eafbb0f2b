"""Result files with per-example scores, and the comparison of two results."""

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from benchmarks.result_files import compare_results, read_result, write_result
from benchmarks.runner import evaluate
from benchmarks.statistics import paired_difference
from benchmarks.tasks import Scores
from cvlm.cli.main import main
from cvlm.errors import CvlmError
from cvlm.model import compose

RNG = np.random.default_rng(0)
CLUSTERS = np.repeat(np.arange(40), 3)
STRONG, WEAK = (RNG.random(120) < 0.9).astype(float), (RNG.random(120) < 0.5).astype(float)


def save(path: Path, values: np.ndarray, clusters: np.ndarray = CLUSTERS, **changed: Any) -> Path:
    result = {
        "model": path.stem,
        "task": "vqa",
        "data": "colours",
        "split": "test",
        "n": len(values),
        "data_fingerprint": "f",
        "labels_fingerprint": "l",
        "metrics": {"accuracy": {"definition": "share", "mean": values.mean()}},
    }
    write_result(result | changed, path, Scores(values={"accuracy": values}, clusters={"accuracy": clusters}))
    return path


@pytest.fixture
def strong(tmp_path: Path) -> Path:
    return save(tmp_path / "strong.json", STRONG)


@pytest.fixture
def weak(tmp_path: Path) -> Path:
    return save(tmp_path / "weak.json", WEAK)


def test_evaluate_writes_what_can_be_read(tmp_path: Path, tiny_spec: Any, colour_vqa: Any) -> None:
    out = tmp_path / "deep" / "result.json"
    model = compose(tiny_spec(), task="vqa", answers=("red", "green", "blue"))
    result = evaluate(model, data=colour_vqa(9), out=out)
    stored, scores = read_result(out)
    assert stored == result | {"scores": stored["scores"]}
    assert stored["scores"]["file"] == "result.scores.npz"
    assert scores.values["accuracy"].mean() == pytest.approx(result["metrics"]["accuracy"]["mean"])
    assert sorted(path.name for path in out.parent.iterdir()) == ["result.json", "result.scores.npz"]


def test_other_labels_change_their_fingerprint(tiny_spec: Any, colour_vqa: Any) -> None:
    model, data = compose(tiny_spec(), task="vqa", answers=("red", "green", "blue")), colour_vqa(6)
    labels = np.asarray(data.labels)
    people = tuple((("red",) * 9 + ("blue",)) for _ in range(6))
    variants = [data, replace(data, labels=(labels + 1) % 3), replace(data, references=people)]
    results = [evaluate(model, data=variant) for variant in variants]
    assert len({result["data_fingerprint"] for result in results}) == 1, "labels are no part of it"
    assert len({result["labels_fingerprint"] for result in results}) == 3
    assert evaluate(model, data=data)["labels_fingerprint"] == results[0]["labels_fingerprint"]


def test_the_difference_is_the_paired_one(strong: Path, weak: Path) -> None:
    result = compare_results(strong, weak)
    expected = paired_difference(STRONG, WEAK, CLUSTERS)
    accuracy = result["metrics"]["accuracy"]
    assert accuracy == {"first": STRONG.mean(), "second": WEAK.mean(), **expected.as_json()}
    assert accuracy["difference"] == pytest.approx(STRONG.mean() - WEAK.mean())
    assert (result["first"], result["second"], result["n"]) == ("strong", "weak", 120)
    assert result["verdict"].startswith("strong is higher than weak in accuracy")
    assert compare_results(strong, strong)["verdict"].startswith("no difference shown")


@pytest.mark.parametrize("command", [["bench", "compare"], ["compare"]])
def test_the_command(strong: Path, weak: Path, capsys: pytest.CaptureFixture[str], command: list[str]) -> None:
    out = strong.with_name("difference.json")
    assert main([*command, str(strong), str(weak), "--out", str(out)]) == 0
    printed = capsys.readouterr().out
    assert "strong is higher than weak in accuracy" in printed
    assert json.loads(out.read_text()) == compare_results(strong, weak)
    assert main([*command, str(strong), "nowhere.json"]) == 2
    assert "cannot read the result nowhere.json" in capsys.readouterr().err


class TestRefused:
    @pytest.mark.parametrize(
        ("changed", "message"),
        [
            ({"data_fingerprint": "g"}, r"they differ in data_fingerprint \('f' and 'g'\)"),
            ({"labels_fingerprint": "m"}, r"they differ in labels_fingerprint \('l' and 'm'\)"),
            ({"split": "train", "n": 9}, r"they differ in split \('test' and 'train'\), n \(120 and 9\)"),
            ({"task": "retrieval"}, r"they differ in task \('vqa' and 'retrieval'\)"),
            ({"metrics": {"accuracy": {"definition": "other"}}}, "they differ in the metrics or their definitions"),
            ({"metrics": {"recall": {"definition": "share"}}}, "they differ in the metrics or their definitions"),
        ],
    )
    def test_results_that_do_not_fit(self, strong: Path, changed: dict[str, Any], message: str) -> None:
        other = save(strong.with_name("other.json"), WEAK, **changed)
        with pytest.raises(CvlmError, match=message):
            compare_results(strong, other)

    def test_other_examples(self, strong: Path) -> None:
        other = save(strong.with_name("other.json"), WEAK, clusters=CLUSTERS[::-1].copy())
        with pytest.raises(CvlmError, match="scored other examples in accuracy"):
            compare_results(strong, other)

    def test_scores_of_another_run(self, strong: Path, weak: Path) -> None:
        weak.with_suffix(".scores.npz").replace(strong.with_suffix(".scores.npz"))
        with pytest.raises(CvlmError, match=r"strong\.scores\.npz is not the file .* \(sha256 differs\)"):
            read_result(strong)

    def test_scores_that_are_gone(self, strong: Path) -> None:
        strong.with_suffix(".scores.npz").unlink()
        with pytest.raises(CvlmError, match=r"cannot read .*strong\.scores\.npz, the per-example scores of"):
            read_result(strong)

    def test_scores_outside_the_folder(self, strong: Path, weak: Path) -> None:
        inner = strong.parent / "inner" / "result.json"
        named = json.loads(strong.read_text())
        named["scores"]["file"] = "../strong.scores.npz"
        write_result(named, inner)
        with pytest.raises(CvlmError, match=r"cannot read .*inner/strong\.scores\.npz"):
            read_result(inner)

    @pytest.mark.parametrize(
        ("text", "message"),
        [
            ("{", "cannot read the result"),
            ("[1]", "no result of cvlm bench: it has no task"),
            ('{"task": "vqa"}', "it has no data_fingerprint, labels_fingerprint, split, n, metrics"),
        ],
    )
    def test_no_result(self, tmp_path: Path, text: str, message: str) -> None:
        (tmp_path / "r.json").write_text(text)
        with pytest.raises(CvlmError, match=message):
            read_result(tmp_path / "r.json")

    def test_a_result_without_scores(self, strong: Path) -> None:
        content = json.loads(strong.read_text())
        del content["scores"]
        write_result(content, strong)
        with pytest.raises(CvlmError, match="names no per-example scores"):
            read_result(strong)

    def test_a_folder_in_the_way(self, tmp_path: Path) -> None:
        (tmp_path / "r.scores.npz").mkdir()
        with pytest.raises(CvlmError, match="cannot write the result to"):
            save(tmp_path / "r.json", STRONG)
