"""The shipped DoKTra recipe through the command line, on few tweets: stages, teacher, report, scoring."""

import json
from pathlib import Path

import pytest
from safetensors import safe_open

from cvlm.cli.main import main

RECIPE = str(Path(__file__).parents[2] / "configs" / "recipes" / "doktra.yaml")
PHASES = ("teacher", "finetune", "labels_longer", "penalty", "doktra")
SHORT = ["data.limit=32", "seeds=[0]", "engine.device=cpu", "student.text.max_length=12", "teacher.text.max_length=12"]
SHORT += [f"phases.{phase}.{setting}" for phase in PHASES for setting in ("epochs=2", "batch_size=8")]
SHORT += ["phases.doktra.log_gradients=true", "phases.penalty.balance=gradient_norm"]


def test_the_recipe_runs(tmp_path):
    run = tmp_path / "run"
    assert main(["run", RECIPE, *SHORT, "--out", str(run), "--quiet"]) == 0
    metrics = json.loads((run / "metrics.json").read_text())
    assert list(metrics["arms"]) == ["majority", *PHASES]
    cost = json.loads((run / "cost.json").read_text())["phases"]
    assert cost["targets"]["samples"] >= 32, "the teacher was run for its targets"
    assert (metrics["task"], metrics["metric"], metrics["n"]) == ("text", "accuracy", 32)
    page = (run / "report.html").read_text()
    assert '<th scope="row">doktra</th><td>activation_boundary</td>' in page

    log = json.loads((run / "doktra" / "seed0" / "log.json").read_text())
    assert [sorted(name for name in record if name.startswith("term/")) for record in log] == (
        [["term/activation_boundary"]] * 4 + [["term/entropy", "term/labels"]] * 4
    )
    assert log[3]["term/activation_boundary"] < log[0]["term/activation_boundary"]
    assert [record["weight/entropy"] for record in log] == [0.0] * 4 + [0.5] * 4
    assert log[-1]["gradient/labels"] + log[-1]["gradient/entropy"] == pytest.approx(1)
    teacher = json.loads((run / "teacher" / "log.json").read_text())
    assert teacher[0]["loss"] == pytest.approx(teacher[0]["term/labels"] + 0.3 * teacher[0]["term/entropy"], rel=1e-4)
    assert teacher[0]["term/entropy"] < 0
    with safe_open(run / "doktra" / "model.safetensors", "pt") as weights:
        assert {name.split(".")[0] for name in weights.keys()} == {"text", "answer_head"}  # noqa: SIM118
