"""A run that is killed, at any moment and as often as it happens, ends in the result of one that was not."""

import json
import os
import random
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import yaml
from killing import kill_after
from safetensors.numpy import load_file

from cvlm.config import load_recipe

TOWERS = {
    "vision": {"name": "package:efficientnet_lite0", "image_size": 32, "layer": 3},
    "text": {"name": "package:minilm_l6"},
}
RECIPE = {
    "task": "vqa",
    "data": {"kind": "easy_vqa", "limit": 600, "labelled": 0.5},
    "student": {**TOWERS, "fusion": {"kind": "cross", "width": 32, "depth": 1, "heads": 4}},
    "teacher": {"kind": "cvlm", **TOWERS, "fusion": {"kind": "co_attention", "width": 48, "depth": 2, "heads": 3}},
    "phases": {
        "teacher": {"epochs": 4, "batch_size": 16, "objectives": ["labels"]},
        "finetune": {"epochs": 4, "batch_size": 16, "objectives": ["labels"]},
        "distill": {
            "epochs": 3,
            "batch_size": 16,
            "pairs": "all",
            "objectives": ["labels", "logits", "cross_attention"],
        },
    },
    "seeds": [0, 1],
    "engine": {"device": "cpu"},
}


def start(recipe: Path, out: Path) -> subprocess.Popen:
    command = [sys.executable, "-m", "cvlm.cli.main", "run", str(recipe), "--out", str(out), "--quiet"]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    return subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


def finish(recipe: Path, out: Path) -> None:
    process = start(recipe, out)
    _, errors = process.communicate(timeout=600)
    assert process.returncode == 0, errors


def results(out: Path) -> dict:
    return json.loads((out / "metrics.json").read_text())


def same_weights(left: Path, right: Path, number: int) -> None:
    names = sorted(path.relative_to(left) for path in left.rglob("model.safetensors"))
    assert names == sorted(path.relative_to(right) for path in right.rglob("model.safetensors"))
    assert len(names) == number
    for name in names:
        ours, theirs = load_file(left / name), load_file(right / name)
        for key in ours:
            np.testing.assert_array_equal(ours[key], theirs[key], err_msg=f"{name} {key}")


def files(out: Path) -> int:
    return sum(len(names) for _, _, names in os.walk(out))


def kill_and_compare(tmp_path: Path, kills: int, seed: int, **changes: object) -> None:
    recipe, out = tmp_path / "recipe.yaml", tmp_path / "cut"
    content = {**RECIPE, **changes}
    recipe.write_text(yaml.safe_dump(content, sort_keys=False))
    finish(recipe, tmp_path / "whole")
    dice, killed = random.Random(seed), 0
    most = files(tmp_path / "whole") // 2
    while killed < kills:
        more, pause = dice.randint(1, most), dice.uniform(0, 0.2)
        killed += kill_after(start(recipe, out), lambda: files(out), more, pause)
        if (out / "metrics.json").exists() and killed < kills:
            shutil.rmtree(out)
    finish(recipe, tmp_path / "cut")
    assert results(tmp_path / "cut") == results(tmp_path / "whole")
    arms = load_recipe(recipe).student_arms
    same_weights(tmp_path / "whole", tmp_path / "cut", 1 + len(arms) * (len(content["seeds"]) + 1))
    jobs = [json.loads((tmp_path / run / "cost.json").read_text())["phases"] for run in ("whole", "cut")]
    assert jobs[0].keys() == jobs[1].keys()
    for phase in ("teacher", *arms):
        assert jobs[0][phase]["flops"] == jobs[1][phase]["flops"], "resumed work is counted once"


def test_killed_twice(tmp_path):
    kill_and_compare(tmp_path, kills=2, seed=0)


def test_a_chain_is_killed(tmp_path):
    phases = {name: {**phase, "epochs": 2} for name, phase in RECIPE["phases"].items()}
    data = {"kind": "easy_vqa", "limit": 200, "labelled": 0.5}
    chain = {"phase": "distill", "rounds": 2}
    kill_and_compare(tmp_path, kills=1, seed=2, data=data, seeds=[0], phases=phases, chain=chain)


@pytest.mark.slow
def test_killed_many_times(tmp_path):
    kill_and_compare(tmp_path, kills=20, seed=1)


def start_phase(recipe: Path, out: Path) -> subprocess.Popen:
    command = [sys.executable, "-m", "cvlm.cli.main", "train", str(recipe), "--phase", "finetune", "--out", str(out)]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    return subprocess.Popen([*command, "--quiet"], env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE)


def events(out: Path) -> int:
    """One file per attempt, opened when its first step is about to be made."""
    return len(list(out.glob("finetune/seed0/tensorboard/*")))


@pytest.mark.slow
def test_a_training_phase_killed_twenty_times_ends_in_the_same_bytes(tmp_path):
    recipe = tmp_path / "recipe.yaml"
    finetune = {"epochs": 20, "batch_size": 16, "objectives": ["labels"]}
    recipe.write_text(yaml.safe_dump({**RECIPE, "teacher": None, "phases": {"finetune": finetune}}, sort_keys=False))

    def finish_phase(out: Path) -> None:
        process = start_phase(recipe, out)
        _, errors = process.communicate(timeout=600)
        assert process.returncode == 0, errors

    finish_phase(tmp_path / "whole")
    (begun,) = (tmp_path / "whole").glob("finetune/seed0/tensorboard/*")
    weights = Path("finetune", "seed0", "model.safetensors")
    length = (tmp_path / "whole" / weights).stat().st_mtime - float(begun.name.split(".")[3])
    dice, out = random.Random(2), tmp_path / "cut"
    kills, resumed = 0, 0
    while kills < 20:
        pause = dice.uniform(0, 0.5) * max(length, 1)
        kills += kill_after(start_phase(recipe, out), lambda: events(out), 1, pause)
        resumed += bool(list(out.glob("finetune/seed0/checkpoint-*/complete.json")))
        if (out / weights).exists() and kills < 20:
            shutil.rmtree(out)
    assert resumed > 3, "no attempt had a checkpoint to go on from"
    finish_phase(out)
    assert (out / weights).read_bytes() == (tmp_path / "whole" / weights).read_bytes()
    logs = [(run / "finetune" / "seed0" / "log.json").read_bytes() for run in (tmp_path / "whole", out)]
    assert logs[0] == logs[1]
