"""Recipes whose training pairs are streamed: from a web server, from programs, interrupted, on two processes."""

import functools
import json
import os
import subprocess
import sys
import threading
from collections.abc import Iterator
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest
import torch
import yaml
from data_files import write_karpathy, write_vqav2

import cvlm
from cvlm.cli.main import main
from cvlm.data.importing import ImportSettings, import_data
from cvlm.errors import CvlmError

TOWERS = {
    "vision": {"name": "package:efficientnet_lite0", "image_size": 32, "layer": 3},
    "text": {"name": "package:minilm_l6"},
}
FUSION = {"kind": "cross", "width": 32, "depth": 1, "heads": 4}


@pytest.fixture(scope="module")
def shards(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("vqa")
    write_vqav2(folder / "src", pictures=20)
    import_data("vqav2", folder / "src", folder / "data", ImportSettings(workers=1, shard_samples=7))
    return folder / "data"


@pytest.fixture(scope="module")
def server(shards) -> Iterator[str]:
    """The shards behind HTTP; the log stays off the terminal."""

    class Quiet(SimpleHTTPRequestHandler):
        def log_message(self, *_: object) -> None:
            pass

    with ThreadingHTTPServer(("127.0.0.1", 0), functools.partial(Quiet, directory=str(shards))) as serving:
        threading.Thread(target=serving.serve_forever, daemon=True).start()
        yield f"http://127.0.0.1:{serving.server_address[1]}"
        serving.shutdown()


def write_recipe(path: Path, shards: Path, train: object, **changes: object) -> Path:
    phase = {"epochs": 1, "batch_size": 8}
    recipe = {
        "task": "vqa",
        "data": {"kind": "stream", "train": train, "samples": 40, "test": str(shards), "shuffle": 16},
        "student": {**TOWERS, "fusion": FUSION},
        "teacher": {"kind": "cvlm", **TOWERS, "fusion": {**FUSION, "width": 48}},
        "phases": {
            "teacher": {**phase, "objectives": ["labels"]},
            "finetune": {**phase, "objectives": ["labels"]},
            "distill": {**phase, "pairs": "all", "objectives": ["labels", "logits", "cross_attention"]},
        },
        "seeds": [0],
        "engine": {"device": "cpu"},
        **changes,
    }
    path.write_text(yaml.safe_dump(recipe, sort_keys=False))
    return path


def test_a_recipe_streams_from_a_web_server_and_a_program(shards, server, tmp_path, capsys):
    train = [f"{server}/train-{{000000..000001}}.tar", f"pipe:cat {shards}/train-000002.tar"]
    recipe = write_recipe(tmp_path / "recipe.yaml", shards, train)
    assert main(["run", str(recipe), "--out", str(tmp_path / "run"), "--quiet"]) == 0, capsys.readouterr().err
    metrics = json.loads((tmp_path / "run" / "metrics.json").read_text())
    assert set(metrics["arms"]) == {"teacher", "finetune", "distill"}, "nobody counts the answers of a stream"
    assert metrics["n"] == 40
    assert metrics["skipped"] == {"train": [], "test": []}
    costs = json.loads((tmp_path / "run" / "cost.json").read_text())["phases"]
    assert [costs[phase]["samples"] for phase in ("teacher", "finetune", "distill")] == [40, 40, 40]
    assert costs["distill"]["flops"] > costs["finetune"]["flops"], "the teacher runs live"
    assert list((tmp_path / "run" / "features").glob("*")), "the split that is scored is stored"
    assert not (tmp_path / "run" / "targets").exists()
    record = json.loads((tmp_path / "run" / "distill" / "training_data.json").read_text())
    assert any("streamed, not recorded" in line for line in record["unknown"])


def test_a_stream_of_the_wrong_kind_is_refused_before_training(shards, tmp_path, capsys):
    cases = {
        "1 of 1 shards do not exist": "nothing.tar",
        "cannot read the shard pipe:false": "pipe:false",
        "no pair": "pipe:head -c 10240 /dev/zero",
    }
    for message, train in cases.items():
        recipe = write_recipe(tmp_path / "recipe.yaml", shards, train)
        assert main(["run", str(recipe), "--out", str(tmp_path / "run"), "--quiet"]) == 2
        error = capsys.readouterr().err
        assert message in error
        assert "Traceback" not in error
        assert not (tmp_path / "run").exists()


def make_model(shards: Path) -> cvlm.CVLM:
    torch.manual_seed(0)
    answers = json.loads((shards / "index.json").read_text())["answers"]
    return cvlm.build(**TOWERS, fusion={**FUSION, "dropout": 0.1}, task="vqa", answers=answers)


def weights(model: cvlm.CVLM) -> dict[str, torch.Tensor]:
    return {k: v for k, v in model.state_dict().items() if not k.startswith(("vision.", "text."))}


def test_an_interrupted_stream_ends_in_the_same_weights(shards, tmp_path):
    class KilledError(Exception):
        pass

    def kill(step: int, steps: int, loss: float | None) -> None:
        if step == 6:
            raise KilledError

    data = {"kind": "stream", "train": str(shards / "train-{000000..000002}.tar"), "samples": 30, "test": str(shards)}

    def train(out: Path, **settings: object) -> cvlm.CVLM:
        model = make_model(shards)
        cvlm.distill(model, None, data=data, objectives=["labels"], epochs=2, batch_size=6, out=out, **settings)
        return model

    whole = weights(train(tmp_path / "whole"))
    with pytest.raises(KilledError):
        train(tmp_path / "cut", report=kill)
    seen: list[int] = []
    resumed = weights(train(tmp_path / "cut", report=lambda step, steps, loss: seen.append(step)))
    assert seen[0] > 1
    assert all(torch.equal(whole[name], resumed[name]) for name in whole)


def test_shards_by_pattern(shards, tmp_path):
    """Those of an import are read at random, and can be scored; others are counted and streamed."""
    pattern = str(shards / "train-{000000..000001}.tar")
    result = cvlm.distill(make_model(shards), None, data=pattern, objectives=["labels"], epochs=1, batch_size=7)
    assert result.cost.samples == 28
    assert cvlm.evaluate(result.model, data=str(shards / "val-000000.tar"), allow_contaminated=True)["n"] == 14
    (tmp_path / "bare.tar").write_bytes((shards / "train-000000.tar").read_bytes())
    bare = str(tmp_path / "bare.tar")
    assert cvlm.distill(make_model(shards), None, data=bare, objectives=["labels"], epochs=2).cost.samples == 28
    with pytest.raises(CvlmError, match="can only be streamed, for training"):
        cvlm.evaluate(result.model, data=bare)
    with pytest.raises(CvlmError, match=r"train-000009\.tar is no shard of the import"):
        cvlm.distill(result.model, None, data=str(shards / "train-000009.tar"), objectives=["labels"])


def test_retrieval_streams_too(tmp_path):
    write_karpathy(tmp_path / "src", pictures=24)
    import_data("karpathy", tmp_path / "src", tmp_path / "data", ImportSettings(workers=1))
    train = str(tmp_path / "data" / "train-000000.tar")
    phases = {"finetune": {"epochs": 1, "batch_size": 6, "objectives": ["labels"]}}
    data = {"kind": "stream", "train": train, "samples": 12, "test": str(tmp_path / "data")}
    changes = {"task": "retrieval", "data": data, "teacher": None, "phases": phases}
    recipe = write_recipe(tmp_path / "recipe.yaml", tmp_path, train, **changes)
    assert main(["run", str(recipe), "--out", str(tmp_path / "run"), "--quiet"]) == 0
    assert json.loads((tmp_path / "run" / "metrics.json").read_text())["task"] == "retrieval"


@pytest.mark.slow
def test_two_processes_stream(shards, server, tmp_path):
    """Three shards for two processes: two for one, one for the other; both make all steps."""
    recipe = write_recipe(tmp_path / "recipe.yaml", shards, f"{server}/train-{{000000..000002}}.tar")
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2"]
    for phase in ("teacher", "finetune", "distill"):
        arguments = [
            "-m",
            "cvlm.cli.main",
            "train",
            str(recipe),
            "--phase",
            phase,
            "--out",
            str(tmp_path / "run"),
            "--quiet",
        ]
        done = subprocess.run(
            [*command, *arguments],
            env={**os.environ, "OMP_NUM_THREADS": "1"},
            capture_output=True,
            text=True,
            timeout=300,
        )
        assert done.returncode == 0, done.stderr
    costs = json.loads((tmp_path / "run" / "cost.json").read_text())["phases"]
    assert costs["distill"]["samples"] == 40
