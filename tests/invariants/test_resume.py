"""A run that is killed, at any moment and as often as it happens, ends in the result of one that was not."""

import json
import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import yaml
from safetensors.numpy import load_file

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


def same_weights(left: Path, right: Path) -> None:
    names = sorted(path.relative_to(left) for path in left.rglob("model.safetensors"))
    assert names == sorted(path.relative_to(right) for path in right.rglob("model.safetensors"))
    assert len(names) == 1 + 2 * (2 + 1), "the teacher, and two arms of two seeds and a copy each"
    for name in names:
        ours, theirs = load_file(left / name), load_file(right / name)
        for key in ours:
            np.testing.assert_array_equal(ours[key], theirs[key], err_msg=f"{name} {key}")


def kill_and_compare(tmp_path: Path, kills: int, seed: int) -> None:
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text(yaml.safe_dump(RECIPE, sort_keys=False))
    begun = time.monotonic()
    finish(recipe, tmp_path / "whole")
    length = time.monotonic() - begun
    draw, cut = random.Random(seed), 0
    for _ in range(kills):
        process = start(recipe, tmp_path / "cut")
        try:
            process.wait(timeout=draw.uniform(0.3, 0.95) * length)
        except subprocess.TimeoutExpired:
            process.send_signal(signal.SIGKILL)
            cut += 1
        process.communicate()
        if (tmp_path / "cut" / "metrics.json").exists():
            break
    assert cut, "nothing was killed"
    finish(recipe, tmp_path / "cut")
    assert results(tmp_path / "cut") == results(tmp_path / "whole")
    same_weights(tmp_path / "whole", tmp_path / "cut")
    jobs = [json.loads((tmp_path / run / "cost.json").read_text())["phases"] for run in ("whole", "cut")]
    assert jobs[0].keys() == jobs[1].keys()
    for phase in ("teacher", "finetune", "distill"):
        assert jobs[0][phase]["flops"] == jobs[1][phase]["flops"], "resumed work is counted once"


def test_killed_twice(tmp_path):
    kill_and_compare(tmp_path, kills=2, seed=0)


@pytest.mark.slow
def test_killed_many_times(tmp_path):
    kill_and_compare(tmp_path, kills=20, seed=1)
