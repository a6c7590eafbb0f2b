"""The shipped recipes run on imported data, from the official files to metrics.json."""

import json
from pathlib import Path

import pytest
from data_files import write_karpathy, write_vqav2

from cvlm.cli.main import main

RECIPES = Path(__file__).parents[2] / "configs" / "recipes"
ARMS = {"vqav2": ["finetune", "distill"], "karpathy": ["finetune", "labels_longer", "distill"]}
SHORT = ["seeds=[0]", "student.vision.image_size=32", "teacher.vision.image_size=32", "engine.device=cpu"]


@pytest.mark.parametrize("name", ARMS)
def test_import_then_run_then_bench(tmp_path, capsys, name):
    src = write_vqav2(tmp_path / "src", 20) if name == "vqav2" else write_karpathy(tmp_path / "src", 40, coco=True)
    out, run = str(tmp_path / "shards"), tmp_path / "run"
    assert main(["data", "import", name, str(src), out, "--quiet"]) == 0
    short = [f"phases.{phase}.{key}" for phase in ("teacher", *ARMS[name]) for key in ("epochs=1", "batch_size=8")]
    recipe = [str(RECIPES / f"{name}.yaml"), f"data.path={out}", *SHORT, *short]
    assert main(["run", *recipe, "--out", str(run), "--quiet"]) == 0
    metrics = json.loads((run / "metrics.json").read_text())
    arms = ["majority"] * (name == "vqav2") + ["teacher", *ARMS[name]]
    assert list(metrics["arms"]) == arms
    assert metrics["n"] == (40 if name == "vqav2" else 20)
    capsys.readouterr()
    # The same numbers again from the saved model and the folder alone.
    assert main(["bench", str(run / "distill"), "--data", out, "--out", str(tmp_path / "b.json"), "--quiet"]) == 0
    result = json.loads((tmp_path / "b.json").read_text())
    metric = metrics["metric"]
    assert result["metrics"][metric]["mean"] == pytest.approx(metrics["arms"]["distill"][metric]["mean"], abs=1e-6)
    if name == "vqav2":
        assert result["metrics"]["accuracy"]["definition"].startswith("official VQA accuracy")
        assert 0.25 < metrics["arms"]["majority"]["accuracy"]["mean"] < 1
