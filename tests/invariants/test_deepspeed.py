"""The quickstart's distill phase, shortened: two CPU processes under ZeRO give the losses of one process."""

import importlib.util
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import load_file

ROOT = Path(__file__).parents[2]
SHORTER = [
    "data.limit=200",
    "data.labelled=0.5",
    "seeds=[0]",
    "student.vision.image_size=32",
    "teacher.vision.image_size=32",
    # Dropout draws differ between one process and two.
    "student.fusion.dropout=0",
    *(f"phases.{phase}.epochs=1" for phase in ("teacher", "finetune", "distill")),
    "phases.distill.batch_size=32",
    "engine.device=cpu",
]
pytestmark = pytest.mark.skipif(importlib.util.find_spec("deepspeed") is None, reason="deepspeed is Linux only")


def train(out: Path, phase: str, *overrides: str, processes: int = 1) -> None:
    launcher = (
        ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node", str(processes)] if processes > 1 else []
    )
    recipe = str(ROOT / "configs" / "quickstart" / "vqa.yaml")
    command = [sys.executable, *launcher, "-m", "cvlm.cli.main", "train", recipe, *SHORTER, *overrides]
    done = subprocess.run(
        [*command, "--phase", phase, "--out", str(out), "--quiet"],
        env={**os.environ, "OMP_NUM_THREADS": "1", "DS_ACCELERATOR": "cpu"},
        capture_output=True,
        text=True,
        timeout=600,
    )
    assert done.returncode == 0, done.stderr


@pytest.fixture(scope="module")
def begun(tmp_path_factory) -> Path:
    """A run folder with a teacher and phase 1."""
    out = tmp_path_factory.mktemp("begun") / "run"
    for phase in ("teacher", "finetune"):
        train(out, phase)
    return out


def distilled(begun: Path, out: Path, *overrides: str, processes: int = 1) -> tuple[list[dict], dict, dict]:
    shutil.copytree(begun, out)
    (out / "recipe.yaml").unlink()  # the engine differs
    train(out, "distill", *overrides, processes=processes)
    folder = out / "distill" / "seed0"
    cost = json.loads((out / "cost.json").read_text())["phases"]["distill"]
    return json.loads((folder / "log.json").read_text()), load_file(folder / "model.safetensors"), cost


def assert_same(one: tuple[list[dict], dict, dict], two: tuple[list[dict], dict, dict]) -> None:
    assert len(one[0]) == len(two[0]) > 3
    for alone, split in zip(one[0], two[0], strict=True):
        for term in ("loss", "grad_norm", "term/labels", "term/logits", "term/cross_attention"):
            # Two ranks add up their halves of a batch in another order.
            assert alone[term] == pytest.approx(split[term], rel=1e-4), (term, alone["step"])
    # Every process books its own work, and the merged ledger holds all of it.
    assert one[2]["flops"] == pytest.approx(two[2]["flops"], rel=0.02)
    assert one[2]["samples"] == two[2]["samples"]
    assert one[1].keys() == two[1].keys()
    for name, weights in one[1].items():
        # Adam turns rounding into whole steps where a gradient is all but zero: the mean is judged, in steps of 1e-3.
        assert np.abs(weights - two[1][name]).mean() < 1e-4, name


def test_zero_2_on_two_processes_gives_the_losses_of_one(begun, tmp_path):
    one = distilled(begun, tmp_path / "one")
    two = distilled(begun, tmp_path / "two", f"engine.deepspeed={ROOT}/configs/deepspeed/zero2.json", processes=2)
    assert_same(one, two)


@pytest.mark.slow
@pytest.mark.parametrize("stage", [1, 3])
def test_other_stages_too(begun, tmp_path, stage):
    one = distilled(begun, tmp_path / "one")
    zero = f"engine.deepspeed={ROOT}/configs/deepspeed/zero{stage}.json"
    assert_same(one, distilled(begun, tmp_path / "two", zero, processes=2))


@pytest.mark.slow
def test_plain_data_parallel_too(begun, tmp_path):
    assert_same(distilled(begun, tmp_path / "one"), distilled(begun, tmp_path / "two", processes=2))
