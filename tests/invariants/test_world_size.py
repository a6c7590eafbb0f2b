"""A phase interrupted in the middle of an epoch goes on, with another number of processes, as if nothing had been."""

import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import load_file

# 90 pairs and batches of 14, shared out 7 and 7: batches run over the ends of epochs, and epochs end within parts.
PHASE = """
import json, os, sys
from pathlib import Path

import torch
import cvlm
from cvlm.config import EasyVqaData, EngineSpec, PhaseSpec
from cvlm.data import load_data
from cvlm.training import PhaseJob, model_inputs, train_phase
from cvlm.training import phase as room
from distill import build_objective
from safetensors.torch import save_file

out, stop = Path(sys.argv[1]), int(sys.argv[2])
rank = int(os.environ.get("RANK", "0"))
examples = load_data(EasyVqaData(kind="easy_vqa", limit=90), "vqa").train
torch.manual_seed(0)
model = cvlm.build(
    vision={"name": "package:efficientnet_lite0", "image_size": 32, "layer": 3},
    text="package:minilm_l6",
    fusion={"kind": "cross", "width": 24, "depth": 1, "heads": 3, "dropout": 0.0},
    task="vqa",
    answers=examples.answers,
)
seen = []


def collate(job, positions, request):
    seen.extend(int(position) for position in positions)
    return original(job, positions, request)


def report(step, steps, loss):
    if step == stop:
        os._exit(7)


original, room.collate = room.collate, collate
job = PhaseJob(
    student=model,
    phase=PhaseSpec(objectives=("labels",), epochs=4, batch_size=14, accumulate=2, pairs="all"),
    objectives=[build_objective("labels")],
    inputs=model_inputs(model, examples, out / f"features{rank}"),
    engine=EngineSpec(device="cpu"),
    folder=out / "phase",
    report=report,
    seed=5,
)
cost, log = train_phase(job)
(out / f"seen{rank}.json").write_text(json.dumps(seen))
if rank == 0:
    (out / "log.json").write_text(json.dumps(log))
    (out / "cost.json").write_text(json.dumps(cost.to_json()))
    state = {k: v.contiguous() for k, v in model.state_dict().items() if not k.startswith(("vision.", "text."))}
    save_file(state, out / "weights.safetensors")
"""
STOP = 7


def run(out: Path, processes: int, stop: int = 0) -> None:
    out.mkdir(exist_ok=True)
    script = out / "phase.py"
    script.write_text(PHASE)
    several = ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node", str(processes)]
    done = subprocess.run(
        [sys.executable, *(several if processes > 1 else []), str(script), str(out), str(stop)],
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert (done.returncode == 0) == (stop == 0), done.stderr


def seen(out: Path, processes: int) -> list[set[int]]:
    """Pairs of every micro-batch after the one on which the cost was counted, parts put together."""
    parts = [json.loads((out / f"seen{rank}.json").read_text()) for rank in range(processes)]
    size = 14 // processes
    return [
        set().union(*(part[start : start + size] for part in parts))
        for start in range(size, len(parts[0]) + 1 - size, size)
    ]


@pytest.fixture(scope="module")
def whole(tmp_path_factory) -> Path:
    out = tmp_path_factory.mktemp("whole") / "run"
    run(out, 1)
    return out


@pytest.mark.parametrize(
    ("first", "then"),
    [(1, 2), *(pytest.param(*pair, marks=pytest.mark.slow) for pair in ((2, 1), (2, 2), (1, 1)))],
)
def test_an_interrupted_phase_goes_on_with_another_number_of_processes(whole, tmp_path, first, then):
    out = tmp_path / "run"
    run(out, first, stop=STOP)
    assert not (out / "log.json").exists()
    (newest,) = [max(int(p.name.split("-")[1]) for p in (out / "phase").glob("checkpoint-*/"))]
    assert 0 < newest < STOP
    run(out, then)
    # The same pairs in every micro-batch behind the checkpoint, and no other.
    assert seen(out, then) == seen(whole, 1)[2 * newest :]
    expected, found = (json.loads((folder / "log.json").read_text()) for folder in (whole, out))
    assert len(expected) == len(found) == 13  # 4 * 90 / 28
    for one, other in zip(expected, found, strict=True):
        for term in ("loss", "grad_norm", "term/labels", "epoch", "learning_rate"):
            assert one[term] == pytest.approx(other[term], rel=1e-4), (term, one["step"])
    ours, theirs = load_file(whole / "weights.safetensors"), load_file(out / "weights.safetensors")
    assert ours.keys() == theirs.keys()
    for name, weights in ours.items():
        assert np.abs(weights - theirs[name]).mean() < 1e-4, name
    costs = [json.loads((folder / "cost.json").read_text()) for folder in (whole, out)]
    assert costs[0]["samples"] == costs[1]["samples"] == 13 * 28
    assert costs[0]["flops"] == pytest.approx(costs[1]["flops"], rel=0.05)
