"""NLVR2, SNLI-VE and image-text matching, from official files to scores, by the shipped recipes on drawn pictures.

The answers can be read off the pictures, so a model that is wired up right learns them, and one whose pictures, texts
or answers are mixed up does not.
"""

import json
from pathlib import Path

import pytest
from task_files import write_drawn_karpathy, write_drawn_nlvr2, write_drawn_snli_ve

from cvlm.cli.main import main

RECIPES = Path(__file__).parents[2] / "configs" / "recipes"
SMALL = "{kind: cross, width: 64, depth: 1, heads: 4, dropout: 0.0}"
QUICK = ["seeds=[0]", "engine.device=cpu", "data.labelled=1.0", "teacher.vision.name=package:efficientnet_lite0"]
QUICK += [f"{model}.vision.image_size=32" for model in ("student", "teacher")]
QUICK += [f"{model}.fusion={SMALL}" for model in ("student", "teacher")]
for phase, epochs in (("teacher", 6), ("finetune", 6), ("distill", 1)):
    settings = {"epochs": epochs, "batch_size": 16, "learning_rate": 0.003}
    QUICK += [f"phases.{phase}.{key}={value}" for key, value in settings.items()]

CASES = {
    # task: format, writer, texts that are scored, metrics
    "nlvr2": ("nlvr2", write_drawn_nlvr2, 160, {"accuracy", "consistency"}),
    "snli_ve": ("snli_ve", write_drawn_snli_ve, 135, {"accuracy"}),
    "itm": ("karpathy", write_drawn_karpathy, 240, {"accuracy", "two_picture_accuracy"}),
}


@pytest.mark.parametrize("task", CASES)
def test_import_run_bench(tmp_path: Path, task: str) -> None:
    data_format, write, n, names = CASES[task]
    src, shards, run = write(tmp_path / "src"), str(tmp_path / "shards"), tmp_path / "run"
    assert main(["data", "import", data_format, str(src), shards, "--quiet", "--workers", "1"]) == 0
    recipe = str(RECIPES / f"{task}.yaml")
    assert main(["run", recipe, f"data.path={shards}", *QUICK, "--out", str(run), "--quiet"]) == 0
    metrics = json.loads((run / "metrics.json").read_text())
    assert (metrics["task"], metrics["n"], metrics["metric"]) == (task, n, "accuracy")
    arms = metrics["arms"]
    assert list(arms) == ["majority", "teacher", "finetune", "distill"]
    assert all(set(arm) == names for arm in arms.values())
    for arm in ("teacher", "finetune", "distill"):
        assert arms[arm]["accuracy"]["mean"] > arms["majority"]["accuracy"]["mean"] + 0.2, arm
    assert main(["bench", str(run / "distill"), "--data", shards, "--out", str(tmp_path / "b.json"), "--quiet"]) == 0
    result = json.loads((tmp_path / "b.json").read_text())
    assert result["n"] == n
    for name in names:
        assert result["metrics"][name]["mean"] == pytest.approx(arms["distill"][name]["mean"], abs=1e-9)
