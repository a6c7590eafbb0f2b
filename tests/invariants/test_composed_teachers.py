"""Teachers that are no single model, through whole recipes: ensembles, tables, functions, chains, averages, peers."""

import json
import math
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import yaml
from safetensors import safe_open

from cvlm.cli.main import main
from cvlm.config import EasyVqaData
from cvlm.data import load_data

TOWERS = {
    "vision": {"name": "package:efficientnet_lite0", "image_size": 32, "layer": 3},
    "text": {"name": "package:minilm_l6"},
}
TEACHER = {"kind": "cvlm", **TOWERS, "fusion": {"kind": "co_attention", "width": 48, "depth": 2, "heads": 3}}
ANSWERS = 13
LABELS = {"epochs": 2, "batch_size": 16, "objectives": ["labels"]}
CALIBRATED = {**LABELS, "objectives": ["labels", {"kind": "entropy", "weight": 0.3}]}
TAUGHT = {"epochs": 4, "batch_size": 16, "pairs": "all"}
SIMULATOR = f"""
import numpy as np

def simulate(pictures, texts):
    rows = np.full((len(texts), {ANSWERS}), 0.5 / {ANSWERS - 1})
    rows[np.arange(len(texts)), [len(text) % {ANSWERS} for text in texts]] = 0.5
    return rows
"""


@pytest.fixture
def folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", list(sys.path))
    return tmp_path


def run(folder, teacher, phases, **changes) -> int:
    recipe = {
        "task": "vqa",
        "data": {"kind": "easy_vqa", "limit": 48, "labelled": 0.5},
        "student": {**TOWERS, "fusion": {"kind": "cross", "width": 32, "depth": 1, "heads": 4}},
        "teacher": teacher,
        "phases": phases,
        "seeds": [0],
        "engine": {"device": "cpu"},
    }
    (folder / "recipe.yaml").write_text(yaml.safe_dump({**recipe, **changes}, sort_keys=False))
    return main(["run", str(folder / "recipe.yaml"), "--out", str(folder / "run"), "--quiet"])


def log_of(folder, arm) -> list[dict]:
    return json.loads((folder / "run" / arm / "seed0" / "log.json").read_text())


def cost_of(folder) -> dict:
    return json.loads((folder / "run" / "cost.json").read_text())["phases"]


def write_table(path, lines) -> None:
    """People's answers to the first `lines` training pairs: the label, and now and then the next answer."""
    train = load_data(EasyVqaData(kind="easy_vqa", limit=48), "vqa").train
    assert len(train.answers) == ANSWERS
    with path.open("w") as file:
        for image, text, label in list(zip(train.image_of, train.text_of, train.labels, strict=True))[:lines]:
            said = {train.answers[label]: 0.75, train.answers[(label + 1) % ANSWERS]: 0.25}
            row = {"picture": train.pictures[image].key, "text": train.texts[text], "probabilities": said}
            file.write(json.dumps(row) + "\n")


def test_an_ensemble_of_a_calibrated_model_a_function_and_people(folder):
    (folder / "simulator.py").write_text(SIMULATOR)
    write_table(folder / "people.jsonl", 44)
    members = [
        TEACHER,
        {"kind": "callable", "target": "simulator:simulate", "gives": "probabilities"},
        {"kind": "table", "path": "people.jsonl", "skip": 0.1},
    ]
    teacher = {"kind": "ensemble", "members": members, "weights": [1, 1, 2], "attention": 0}
    distill = {**TAUGHT, "start": "fresh", "objectives": ["labels", "logits", "cross_attention"]}
    assert run(folder, teacher, {"teacher": CALIBRATED, "finetune": LABELS, "distill": distill}) == 0
    log = log_of(folder, "distill")
    for term in ("term/logits", "term/cross_attention"):
        assert math.isfinite(log[0][term])
        assert log[-1][term] < log[0][term], term
    cost = cost_of(folder)
    assert cost["distill"]["samples"] == TAUGHT["epochs"] * 44, "pairs that the table lacks are left out"
    assert cost["targets"]["samples"] == 48
    (targets,) = (folder / "run" / "targets").iterdir()
    shares = np.exp(np.load(targets / "logits.npy")[:44].astype(np.float64))
    np.testing.assert_allclose(shares.sum(1), 1, rtol=1e-5)
    (entry,) = [e for e in json.loads((folder / "run" / "teacher" / "log.json").read_text()) if e["step"] == 3]
    assert -math.log(ANSWERS) <= entry["term/entropy"] < 0
    record = json.loads((folder / "run" / "distill" / "training_data.json").read_text())
    assert any("simulator:simulate" in line for line in record["unknown"])
    assert any("people.jsonl" in line for line in record["unknown"])


def test_a_phase_with_a_companion_of_its_own_beside_the_teacher(folder):
    mutual = {**LABELS, "companion": {"kind": "peer"}, "start": "fresh", "objectives": ["labels", "mutual"]}
    distill = {**TAUGHT, "objectives": ["labels", "logits"]}
    assert run(folder, TEACHER, {"teacher": LABELS, "finetune": LABELS, "mutual": mutual, "distill": distill}) == 0
    cost = cost_of(folder)
    assert cost["targets"]["samples"] == 48, "the teacher is asked once, by distill alone"
    assert cost["mutual"]["flops"] > 1.9 * cost["finetune"]["flops"], "the peer trains too"
    saw = {arm: (folder / "run" / arm / "training_data.json").read_text() for arm in ("mutual", "distill")}
    assert '"teacher"' in saw["distill"]
    assert '"teacher"' not in saw["mutual"]


def test_a_chain_hands_each_round_to_the_next(folder):
    phases = {"teacher": LABELS, "finetune": LABELS, "distill": {**TAUGHT, "objectives": ["labels", "logits"]}}
    assert run(folder, TEACHER, phases, chain={"phase": "distill", "rounds": 2}) == 0
    metrics = json.loads((folder / "run" / "metrics.json").read_text())
    arms = ("finetune", "distill", "distill_chain1", "distill_chain2")
    assert set(arms) <= metrics["arms"].keys()
    assert {"distill_chain2_vs_distill", "distill_chain2_vs_distill_chain1"} <= metrics["comparisons"].keys()
    jobs = cost_of(folder)["targets"]["jobs"]
    assert set(jobs) == {"train", "distill_chain1 seed0", "distill_chain2 seed0"}
    for arm, teacher in (("distill_chain1", "distill"), ("distill_chain2", "distill_chain1")):
        # Both begin at phase 1, so the first round is near its teacher at once; it comes nearer.
        log = log_of(folder, arm)
        assert 0 < log[-1]["term/logits"] < log[0]["term/logits"]
        assert (folder / "run" / arm / "config.json").exists()
        record = json.loads((folder / "run" / arm / "training_data.json").read_text())
        assert teacher in record["sources"][0]["used_by"]


def test_the_students_own_average(folder):
    phases = {"distill": {**TAUGHT, "objectives": ["labels", "logits", "cross_attention"]}}
    assert run(folder, {"kind": "ema", "decay": 0.9}, phases) == 0
    log = log_of(folder, "distill")
    assert log[0]["term/logits"] < log[2]["term/logits"]
    assert log[-1]["term/labels"] < log[0]["term/labels"]
    assert not (folder / "run" / "targets").exists()


def test_peers_of_another_build(folder):
    peer = {**TOWERS, "fusion": {"kind": "merged", "width": 24, "depth": 1, "heads": 3}}
    phases = {"finetune": LABELS, "mutual": {**TAUGHT, "start": "fresh", "objectives": ["labels", "mutual"]}}
    assert run(folder, {"kind": "peer", "number": 2, "student": peer}, phases) == 0
    log, cost = log_of(folder, "mutual"), cost_of(folder)
    assert log[-1]["term/labels"] < log[0]["term/labels"]
    assert log[-1]["term/peers"] < log[0]["term/peers"]
    per_pair = {phase: cost[phase]["flops"] / cost[phase]["samples"] for phase in ("finetune", "mutual")}
    assert per_pair["mutual"] > 2 * per_pair["finetune"]
    with safe_open(folder / "run" / "mutual" / "model.safetensors", "pt") as weights:
        assert not any("peers" in name for name in weights.keys())  # noqa: SIM118


@pytest.mark.parametrize(
    ("teacher", "distill", "changes", "message"),
    [
        (
            {"kind": "callable", "target": "simulator:simulate"},
            {"objectives": ["cross_attention"]},
            {},
            "needs text_to_image of the teacher callable (simulator:simulate), which gives logits",
        ),
        (
            {"kind": "callable", "target": "simulator:simulate", "gives": "answers"},
            {"objectives": ["logits"]},
            {},
            "needs logits of the teacher callable (simulator:simulate), which gives answers",
        ),
        ({"kind": "callable", "target": "simulator:wrong"}, {"objectives": ["logits"]}, {}, "has no 'wrong'"),
        ({"kind": "table", "path": "people.jsonl"}, {"objectives": ["logits"]}, {}, "people.jsonl lacks 4 of 48 pairs"),
        ({"kind": "peer"}, {"objectives": ["mutual"]}, {}, "peers train together from the beginning: set start: fresh"),
        (
            {"kind": "peer"},
            {"start": "fresh", "objectives": ["cross_attention"]},
            {},
            "text_to_image of the teacher peer (1 further student(s)), which gives logits",
        ),
        (
            {"kind": "ema"},
            {"objectives": ["cross_attention"]},
            {"student": {**TOWERS, "fusion": {"kind": "none", "width": 32}}},
            "text_to_image",
        ),
        (
            {"kind": "table", "path": "people.jsonl"},
            {"objectives": ["labels"]},
            {"chain": {"phase": "distill"}},
            "chain.phase is 'distill', and none of its objectives reads a teacher; add one",
        ),
    ],
)
def test_what_does_not_fit_is_refused_before_training(folder, capsys, teacher, distill, changes, message):
    (folder / "simulator.py").write_text(SIMULATOR)
    write_table(folder / "people.jsonl", 44)
    phases = {"finetune": LABELS, "distill": {**TAUGHT, **distill}}
    assert run(folder, teacher, phases, **changes) == 2
    assert message in " ".join(capsys.readouterr().err.split())
    assert not (folder / "run" / "finetune").exists()


def distilled(folder, out, teacher, processes, **engine) -> subprocess.CompletedProcess:
    """Train the student phase with `cvlm train`, on one process or several."""
    phases = {"distill": {**TAUGHT, "epochs": 2, "objectives": ["labels", "logits"]}}
    fusion = {"kind": "cross", "width": 32, "depth": 1, "heads": 4, "dropout": 0}  # ranks draw dropout of their own
    recipe = {"task": "vqa", "data": {"kind": "easy_vqa", "limit": 48, "labelled": 0.5}, "teacher": teacher}
    recipe |= {"student": {**TOWERS, "fusion": fusion}, "phases": phases, "seeds": [0]}
    recipe["engine"] = {"device": "cpu", **engine}
    (folder / "recipe.yaml").write_text(yaml.safe_dump(recipe, sort_keys=False))
    launcher = ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node", str(processes)]
    command = [sys.executable, *(launcher if processes > 1 else []), "-m", "cvlm.cli.main", "train"]
    return subprocess.run(
        [*command, str(folder / "recipe.yaml"), "--phase", "distill", "--out", str(folder / out), "--quiet"],
        env={**os.environ, "OMP_NUM_THREADS": "1", "DS_ACCELERATOR": "cpu"},
        capture_output=True,
        text=True,
        timeout=600,
    )


@pytest.mark.slow
@pytest.mark.parametrize("teacher", [{"kind": "ema", "decay": 0.8}, {"kind": "peer"}], ids=["ema", "peer"])
def test_companions_are_the_same_on_two_processes(folder, teacher):
    logs = []
    for processes in (1, 2):
        done = distilled(folder, f"run{processes}", teacher, processes)
        assert done.returncode == 0, done.stderr
        logs.append(json.loads((folder / f"run{processes}" / "distill" / "seed0" / "log.json").read_text()))
    assert len(logs[0]) == len(logs[1]) == 6
    for alone, split in zip(*logs, strict=True):
        for term in ("loss", "term/labels", "term/logits"):
            assert alone[term] == pytest.approx(split[term], rel=1e-3, abs=1e-6), (term, alone["step"])


@pytest.mark.slow
def test_an_average_is_refused_where_weights_are_split(folder):
    pytest.importorskip("deepspeed")
    zero = str(Path(__file__).parents[2] / "configs" / "deepspeed" / "zero3.json")
    done = distilled(folder, "run", {"kind": "ema"}, 2, deepspeed=zero)
    assert done.returncode != 0
    assert "a moving average needs the student's whole weights in every process" in " ".join(done.stderr.split())
