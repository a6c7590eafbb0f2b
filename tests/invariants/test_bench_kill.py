"""A benchmark that is killed at random moments ends in the result of one that was not."""

import json
import multiprocessing
import os
import random
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from cvlm.model import compose

PICTURES = 400
COLOURS = ("red", "green", "blue")
SLOW = """
import time
class Slow:
    def answer(self, pictures, questions):
        time.sleep(0.03)
        return ["red" if picture.getpixel((9, 9))[0] > 128 else "blue" for picture in pictures]
"""


@pytest.fixture
def data(tmp_path: Path) -> Path:
    folder, dice = tmp_path / "data", np.random.default_rng(0)
    folder.mkdir()
    rows = []
    for number in range(PICTURES):
        pixels = dice.integers(0, 255, (48, 48, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(folder / f"{number}.png")
        rows += [
            {"image": f"{number}.png", "text": text, "answer": COLOURS[int(dice.integers(3))]}
            for text in ("which colour is it?", "colour?")
        ]
    (folder / "test.jsonl").write_text("\n".join(map(json.dumps, rows)))
    (folder / "train.jsonl").write_text("\n".join(json.dumps({**rows[0], "answer": one}) for one in COLOURS))
    return folder


@pytest.fixture
def models(tmp_path: Path, tiny_spec: Any) -> dict[str, tuple[str, str]]:
    """Model and task: one of our own, whose towers are trained too, and one that a module gives."""
    spec = tiny_spec(vision={"train": "full"}, text={"train": "full"})
    compose(spec, task="vqa", answers=tuple(sorted(COLOURS))).save_pretrained(tmp_path / "model")
    (tmp_path / "slow_model.py").write_text(SLOW)
    return {"cvlm": (str(tmp_path / "model"), ""), "module": ("slow_model:Slow", "vqa")}


def score(folder: Path, model: tuple[str, str], data: Path, out: Path, ready: Any) -> None:
    """Run in a process of its own, what the command line does."""
    from benchmarks import runner, running

    os.chdir(folder)
    running.PAIRS = 256
    ready.set()
    runner.evaluate(model[0], data=str(data), task=model[1] or None, out=out)


class Machine:
    """Starts processes that have loaded torch already: their evaluation begins at once, and is what a kill hits."""

    def __init__(self) -> None:
        self.context = multiprocessing.get_context("forkserver")
        self.context.set_forkserver_preload(["benchmarks.runner"])

    def start(self, *job: Any) -> Any:
        ready = self.context.Event()
        process = self.context.Process(target=score, args=(*job, ready))
        process.start()
        assert ready.wait(timeout=120)
        return process

    def finish(self, *job: Any) -> float:
        process, begun = self.start(*job), time.perf_counter()
        process.join(timeout=300)
        assert process.exitcode == 0
        return time.perf_counter() - begun


def content(out: Path) -> dict[str, Any]:
    result = json.loads(out.read_text())
    return {key: value for key, value in result.items() if key not in ("date", "machine")}


def kept(out: Path) -> int:
    """Rows and chunks that are on disk."""
    folder = out.with_name(f"{out.name}.part")
    rows = sum(int(path.read_text() or 0) for path in folder.glob("**/done.json"))
    return rows + len(list(folder.glob("answers/*.json")))


@pytest.mark.parametrize(
    ("kind", "kills"),
    [("cvlm", 3), *(pytest.param(kind, 20, marks=pytest.mark.slow) for kind in ("cvlm", "module"))],
)
def test_killed_benchmarks_end_in_the_same_result(
    tmp_path: Path, data: Path, models: dict[str, tuple[str, str]], kind: str, kills: int
) -> None:
    model = models[kind]
    whole, out = tmp_path / "whole.json", tmp_path / "r.json"
    machine = Machine()
    seconds = machine.finish(tmp_path, model, data, whole)
    expected = content(whole)
    expected["scores"]["file"] = "r.scores.npz"
    dice = random.Random(kills)
    killed, in_the_middle = 0, 0
    while killed < kills:
        process = machine.start(tmp_path, model, data, out)
        if killed % 2 == 0:  # every second kill strikes a moment behind the next piece of finished work
            before = kept(out)
            while process.is_alive() and kept(out) <= before:
                time.sleep(0.001)
            time.sleep(dice.uniform(0, seconds / 20))
        else:
            time.sleep(dice.uniform(0, seconds))
        running = process.is_alive()
        process.kill()
        process.join()
        killed += running
        in_the_middle += running and kept(out) > 0
        if out.exists():  # a result that stands is the right one, however early the kill came behind it
            assert content(out) == expected
            out.unlink()
    assert in_the_middle > 0
    machine.finish(tmp_path, model, data, out)
    assert content(out) == expected
    assert not out.with_name("r.json.part").exists()
