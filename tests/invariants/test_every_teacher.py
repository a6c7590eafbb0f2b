"""Every kind of teacher by name: a one-page recipe of twenty steps on quickstart data, and what it refuses."""

import json
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import yaml
from fake_chat_server import Server
from tiny_duals import save_dual, save_open_clip
from tiny_generators import save_llava
from tiny_vlms import WORDS, save_blip, save_bridgetower, save_flava, save_git, save_vilt

from cvlm.cli.main import main
from cvlm.config import EasyVqaData
from cvlm.data import load_data
from distill import TEACHERS

STEPS, PAIRS, BATCH = 20, 40, 16
ATTENTION = {"kind": "cross_attention"}
SIMULATOR = """
import numpy as np

def simulate(pictures, texts):
    places = np.array([sum(map(ord, text)) % 13 for text in texts])
    return 4.0 * np.eye(13)[places]
"""


@contextmanager
def served(folder: Path) -> Iterator[dict[str, Any]]:
    """A chat server in a process of its own; students are trained on what it answers."""
    folder.mkdir()
    server = Server(folder)
    try:
        teacher = {"kind": "server", "url": server.url, "model": "fake", "cache": str(folder / "paid")}
        yield {"teacher": teacher, "objectives": ["labels"], "labels": "teacher", "refused": "logits"}
    finally:
        server.kill()


def named(kind: str, folder: Path, objectives: list[Any], refused: str, **changes: Any) -> dict[str, Any]:
    return {
        "teacher": {"kind": kind, "name": str(folder)},
        "objectives": objectives,
        "refused": refused,
        **changes,
    }


def dual(kind: str, folder: Path) -> dict[str, Any]:
    return named(kind, folder, ["similarity"], "logits", task="retrieval")


def write_table(folder: Path) -> Path:
    """What people would have said: the label, three times out of four."""
    train = load_data(EasyVqaData(kind="easy_vqa", limit=PAIRS), "vqa").train
    lines = []
    for image, text, label in zip(train.image_of, train.text_of, train.labels, strict=True):
        said = {train.answers[label]: 0.75, train.answers[label - 1]: 0.25}
        key = {"picture": train.pictures[image].key, "text": train.texts[text]}
        lines.append(json.dumps({**key, "probabilities": said}))
    (folder / "people.jsonl").write_text("\n".join(lines))
    return folder / "people.jsonl"


def answer_words() -> list[str]:
    """Words that write every answer of the data."""
    answers = load_data(EasyVqaData(kind="easy_vqa", limit=PAIRS), "vqa").train.answers
    return [*WORDS, *sorted(set(answers) - set(WORDS))]


def write_simulator(folder: Path) -> dict[str, Any]:
    (folder / "simulator.py").write_text(SIMULATOR)
    return {"kind": "callable", "target": "simulator:simulate"}


def ensemble(folder: Path) -> dict[str, Any]:
    members = [write_simulator(folder), {"kind": "table", "path": str(write_table(folder))}]
    return {"teacher": {"kind": "ensemble", "members": members}, "objectives": ["logits"], "refused": "cross_attention"}


# kind -> makes a tiny teacher in a folder: its specification, what it can teach, and what it is refused for.
BUILDERS: dict[str, Callable[[Path, dict[str, Any]], Any]] = {
    "cvlm": lambda folder, student: {
        "teacher": {"kind": "cvlm", **student},
        "objectives": ["logits", ATTENTION, "hidden"],
        "refused": "contrastive",
    },
    "flava": lambda folder, _: named("flava", save_flava(folder / "flava"), [ATTENTION, "hidden"], "logits"),
    "vilt": lambda folder, _: named("vilt", save_vilt(folder / "vilt"), [ATTENTION, "hidden"], "contrastive"),
    "blip": lambda folder, _: named(
        "blip",
        save_blip(folder / "blip", "BlipForQuestionAnswering", answer_words()),
        ["logits", ATTENTION],
        "contrastive",
    ),
    "bridgetower": lambda folder, _: named(
        "bridgetower", save_bridgetower(folder / "bridgetower", "BridgeTowerModel"), [ATTENTION, "hidden"], "logits"
    ),
    "git": lambda folder, _: named(
        "git", save_git(folder / "git", answer_words()), ["logits", ATTENTION], "contrastive"
    ),
    "clip": lambda folder, _: dual("clip", save_dual(folder / "clip", "CLIP")),
    "siglip": lambda folder, _: dual("siglip", save_dual(folder / "siglip", "Siglip")),
    "open_clip": lambda folder, _: dual("open_clip", Path(f"local-dir:{save_open_clip(folder / 'open_clip')}")),
    "generative": lambda folder, _: named(
        "generative", save_llava(folder / "llava", chat=True), ["logits"], "cross_attention"
    ),
    "server": lambda folder, _: served(folder / "server"),
    "callable": lambda folder, _: {
        "teacher": write_simulator(folder),
        "objectives": ["logits"],
        "refused": "cross_attention",
    },
    "table": lambda folder, _: {
        "teacher": {"kind": "table", "path": str(write_table(folder))},
        "objectives": ["logits"],
        "refused": "cross_attention",
    },
    "ensemble": lambda folder, _: ensemble(folder),
    "ema": lambda *_: {"teacher": {"kind": "ema"}, "objectives": ["labels", "logits"], "refused": "contrastive"},
    "peer": lambda *_: {"teacher": {"kind": "peer"}, "objectives": ["labels", "mutual"], "refused": "contrastive"},
}

RISING = {"ema": {"logits"}}
"""An average stands where the student begins; it is left behind before it follows."""


@pytest.fixture
def student(bert_folder: Path) -> dict[str, Any]:
    return {
        "vision": {"name": "timm:test_vit", "pretrained": False, "image_size": 64},
        "text": {"name": f"hf:{bert_folder}", "max_length": 24},
        "fusion": {"kind": "cross", "width": 32, "depth": 1, "heads": 4, "dropout": 0.0},
    }


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", [str(tmp_path), *sys.path])
    yield tmp_path
    sys.modules.pop("simulator", None)


def train(folder: Path, student: dict[str, Any], case: dict[str, Any], objectives: list[Any], out: str) -> int:
    task = case.get("task", "vqa")
    phases = {
        "distill": {
            "epochs": STEPS * BATCH / PAIRS,
            "batch_size": BATCH,
            "pairs": "all",
            "learning_rate": 3e-3,
            "labels": case.get("labels", "task"),
            "objectives": objectives,
        }
    }
    if case["teacher"]["kind"] == "cvlm":
        phases = {"teacher": {"epochs": 5, "batch_size": BATCH, "objectives": ["labels"]}, **phases}
    recipe = {
        "task": task,
        "data": {"kind": "easy_vqa" if task == "vqa" else "openmoji", "limit": PAIRS},
        "student": student,
        "teacher": case["teacher"],
        "phases": phases,
        "seeds": [0],
        "engine": {"device": "cpu"},
    }
    path = folder / f"{out}.yaml"
    path.write_text(yaml.safe_dump(recipe, sort_keys=False))
    codes = [
        main(["train", str(path), "--phase", phase, "--out", str(folder / out), "--quiet"])
        for phase in (phases if out == "run" else ["distill"])
    ]
    return max(codes)


def test_the_table_holds_every_kind_and_no_other() -> None:
    assert set(BUILDERS) == set(TEACHERS)


@pytest.mark.parametrize("kind", TEACHERS)
def test_teaches_from_a_recipe_and_is_refused_by_name(
    folder: Path, student: dict[str, Any], capfd: pytest.CaptureFixture[str], kind: str
) -> None:
    built = BUILDERS[kind](folder, student)
    if isinstance(built, dict):
        check(folder, student, capfd, kind, built)
        return
    with built as case:
        check(folder, student, capfd, kind, case)


def check(
    folder: Path, student: dict[str, Any], capfd: pytest.CaptureFixture[str], kind: str, case: dict[str, Any]
) -> None:
    assert train(folder, student, case, [case["refused"]], "refused") == 2
    said = capfd.readouterr().err
    assert f"objective {case['refused']!r} needs " in said
    assert f" of the teacher {kind}" in said
    assert train(folder, student, case, case["objectives"], "run") == 0, capfd.readouterr().err
    log = json.loads((folder / "run" / "distill" / "seed0" / "log.json").read_text())
    assert len(log) == STEPS
    terms = {name.removeprefix("term/") for name in log[0] if name.startswith("term/")}
    assert len(terms) >= len(case["objectives"])
    for term in terms - RISING.get(kind, set()):
        values = [record[f"term/{term}"] for record in log]
        assert np.mean(values[-3:]) < np.mean(values[:3]), (term, values)
