"""Teachers that answer in words, through the command line: paid once, killed in the middle, imitated, inspected."""

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import yaml
from fake_chat_server import Server
from PIL import Image
from tiny_generators import save_llava

from cvlm.cli.main import main
from cvlm.config import parse_recipe
from cvlm.errors import CvlmError

QUESTIONS = 24
COLOURS = ("red", "green", "blue")
SECRET = "sk-very-secret"


@pytest.fixture
def data(tmp_path: Path) -> dict[str, Any]:
    """Pictures of one colour each; every second training line has no answer."""
    folder = tmp_path / "data"
    folder.mkdir()
    for split, number in (("train", QUESTIONS), ("test", 6)):
        lines = []
        for i in range(number):
            pixels = np.random.default_rng([i, number]).integers(0, 60, (16, 16, 3), dtype=np.uint8)
            pixels[..., i % 3] += 150
            Image.fromarray(pixels).save(folder / f"{split}{i}.png")
            line = {"image": f"{split}{i}.png", "text": "colour?", "answer": COLOURS[i % 3]}
            lines.append(line if split == "test" or i % 2 else {key: line[key] for key in ("image", "text")})
        (folder / f"{split}.jsonl").write_text("\n".join(json.dumps(line) for line in lines))
    return {"kind": "jsonl", "path": str(folder), "answers": list(COLOURS)}


@pytest.fixture
def write(tmp_path: Path, data: dict[str, Any], bert_folder: Path) -> Callable[..., Path]:
    """Writes a recipe with a tiny student."""
    student = {
        "vision": {"name": "timm:test_vit", "pretrained": False, "image_size": 32},
        "text": {"name": f"hf:{bert_folder}", "max_length": 16},
        "fusion": {"kind": "cross", "width": 32, "depth": 1, "heads": 4},
    }
    engine = {"device": "cpu"}

    def make(**parts: Any) -> Path:
        path = tmp_path / "recipe.yaml"
        recipe = {"task": "vqa", "data": data, "student": student, "seeds": [0], "engine": engine, **parts}
        path.write_text(yaml.safe_dump(recipe, sort_keys=False))
        return path

    return make


@pytest.fixture
def serve(tmp_path: Path) -> Iterator[Callable[..., Server]]:
    servers: list[Server] = []

    def start(**settings: Any) -> Server:
        servers.append(Server(tmp_path, **settings))
        return servers[-1]

    yield start
    for server in servers:
        server.kill()


def phase(**settings: Any) -> dict[str, Any]:
    return {"epochs": 1, "batch_size": 8, "objectives": ["labels"], **settings}


def run(recipe: Path, out: Path, *more: str) -> None:
    assert main(["run", str(recipe), *more, "--out", str(out), "--quiet"]) == 0


def test_a_server_is_imitated_and_paid_once(
    serve: Callable[..., Server],
    write: Callable[..., Path],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setenv("MY_KEY", SECRET)
    server = serve(key=SECRET)
    teacher = {"kind": "server", "url": server.url, "model": "tiny", "cache": str(tmp_path / "paid")}
    teacher |= {"key_variable": "MY_KEY", "top_logprobs": 4, "patience": 20}
    phases = {
        "imitate": phase(labels="teacher"),
        "told": phase(pairs="all", objectives=[{"kind": "top_k", "targets": "top_logits"}]),
    }
    recipe, first, second = write(teacher=teacher, phases=phases), tmp_path / "first", tmp_path / "second"
    run(recipe, first)
    assert server.paid == QUESTIONS
    provenance = json.loads((first / "imitation" / "provenance.json").read_text())
    assert provenance["counts"]["kept"] == QUESTIONS, "also questions without a label are answered"
    assert provenance["spent"]["requests"] == QUESTIONS
    record = json.loads((first / "imitate" / "seed0" / "training_data.json").read_text())
    assert record["unknown"] == ["teacher tiny: no record of its training data"]
    server.kill()
    run(recipe, second)
    assert server.paid == QUESTIONS
    assert (second / "metrics.json").read_bytes() == (first / "metrics.json").read_bytes()
    everything = b"".join(path.read_bytes() for path in tmp_path.rglob("*") if path.is_file())
    assert SECRET.encode() not in everything
    capsys.readouterr()
    assert main(["targets", "verify", str(first)]) == 0
    assert "1 stored target(s) and the answers: complete, whole, current" in capsys.readouterr().out
    assert main(["targets", "inspect", str(first)]) == 0
    shown = capsys.readouterr().out
    assert "top_values" in shown
    assert "agrees with 100.0% of 12 labels" in shown
    assert "requests 24" in shown


def test_a_run_that_is_killed_while_it_asks_pays_nothing_twice(
    serve: Callable[..., Server], write: Callable[..., Path], tmp_path: Path
) -> None:
    server = serve(delay=0.3)
    teacher = {"kind": "server", "url": server.url, "model": "tiny", "cache": str(tmp_path / "paid"), "concurrency": 2}
    recipe, out = write(teacher=teacher, phases={"imitate": phase(labels="teacher")}), tmp_path / "run"
    command = [sys.executable, "-m", "cvlm.cli.main", "targets", "build", str(recipe), "--out", str(out), "--quiet"]
    process = subprocess.Popen(command, env={**os.environ, "OMP_NUM_THREADS": "1"}, stderr=subprocess.PIPE)
    deadline = time.monotonic() + 120
    while server.paid < 8:
        assert process.poll() is None, process.stderr.read()
        assert time.monotonic() < deadline
        time.sleep(0.02)
    process.send_signal(signal.SIGKILL)
    process.communicate()
    lines = (tmp_path / "paid" / "answers.jsonl").read_text().splitlines()
    assert len(lines) >= server.paid - 2, "only what was in flight is lost"
    server.kill()
    server.settings = {}
    server.start()
    run(recipe, out)
    assert QUESTIONS <= server.paid <= QUESTIONS + 2
    assert json.loads((out / "imitation" / "provenance.json").read_text())["counts"]["kept"] == QUESTIONS


def test_a_trained_teacher_is_imitated_by_its_answers_alone(
    write: Callable[..., Path], tmp_path: Path, capsys: pytest.CaptureFixture[str], bert_folder: Path
) -> None:
    teacher = {
        "kind": "cvlm",
        "vision": {"name": "timm:test_vit", "pretrained": False, "image_size": 32},
        "text": {"name": f"hf:{bert_folder}", "max_length": 16},
        "fusion": {"kind": "cross", "width": 40, "depth": 1, "heads": 4},
    }
    phases = {"teacher": phase(epochs=3), "imitate": phase(labels="teacher"), "told": phase(objectives=["logits"])}
    recipe, out = write(teacher=teacher, phases=phases), tmp_path / "run"
    sampled = ["imitation.samples=4", "imitation.temperature=1.0"]
    assert main(["targets", "build", str(recipe), *sampled, "--out", str(out), "--quiet"]) == 0
    said = capsys.readouterr().out
    assert f"targets of {QUESTIONS} pairs" in said
    assert f"answers to {QUESTIONS} questions" in said
    assert not (out / "imitate").exists(), "no student is trained"
    kept = (out / "imitation" / "answers.jsonl").read_bytes()
    run(recipe, out, *sampled)
    assert (out / "imitation" / "answers.jsonl").read_bytes() == kept
    ledger = json.loads((out / "cost.json").read_text())["phases"]
    assert ledger["targets"]["samples"] == 2 * QUESTIONS, "targets and answers, each once"
    assert ledger["targets"]["flops"] > 0
    assert main(["targets", "inspect", str(out)]) == 0
    assert "nats" in capsys.readouterr().out
    (store,) = (out / "targets").glob("*")
    logits = np.load(store / "logits.npy", mmap_mode="r+")
    logits[3, 1] = np.nan
    logits.flush()
    (out / "imitation" / "imitation.jsonl").write_text("")
    assert main(["targets", "verify", str(out)]) == 2
    problems = capsys.readouterr().err
    assert "logits holds numbers that are not finite" in problems
    assert "imitation.jsonl was changed" in problems


def test_a_generative_model_scores_and_is_imitated(write: Callable[..., Path], tmp_path: Path) -> None:
    teacher = {"kind": "generative", "name": str(save_llava(tmp_path / "llava", chat=True))}
    phases = {"imitate": phase(labels="teacher"), "told": phase(pairs="all", objectives=["logits"])}
    run(write(teacher=teacher, phases=phases), tmp_path / "run")
    provenance = json.loads((tmp_path / "run" / "imitation" / "provenance.json").read_text())
    assert provenance["counts"]["kept"] == QUESTIONS
    assert provenance["teacher"].startswith("generative (")


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({}, "needs a teacher that can be asked"),
        ({"teacher": {"kind": "ema"}}, "needs a teacher that can be asked"),
        ({"task": "retrieval", "teacher": {"kind": "saved", "path": "x"}}, "for tasks with an answer vocabulary"),
        ({"teacher": {"kind": "saved", "path": "x"}, "imitation": {"samples": 3}}, "a temperature above 0"),
        ({"teacher": {"kind": "server", "url": "u", "model": "m", "cache": "c", "max_cost": 1}}, "needs input_price"),
    ],
)
def test_recipes_that_cannot_be_imitated_are_refused(changes: dict[str, Any], message: str) -> None:
    towers = {"vision": {"name": "timm:test_vit"}, "text": {"name": "hf:x"}}
    raw = {"task": "vqa", "data": {"kind": "jsonl", "path": "d"}, "student": towers, **changes}
    with pytest.raises(CvlmError, match=message):
        parse_recipe({**raw, "phases": {"imitate": {"objectives": ["labels"], "labels": "teacher"}}})
