"""Captioning through the command line: import, train with a teacher, score, and score again from the saved model."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import yaml
from PIL import Image, ImageDraw

from benchmarks import captions
from cvlm.cli.main import main

COLOURS = {"red": (220, 30, 30), "green": (30, 180, 40), "blue": (40, 60, 220)}


def write_shapes(folder: Path, number: int) -> Path:
    """Circles and squares of three colours at random places, in Karpathy's format; every fifth is for testing."""
    rng = np.random.default_rng(0)
    (folder / "images").mkdir(parents=True)
    images = []
    for place in range(number):
        kind, colour = ("circle", "square")[place // 3 % 2], list(COLOURS)[place % 3]
        picture = Image.new("RGB", (32, 32), "white")
        left, top = (int(value) for value in rng.integers(0, 10, 2))
        draw = ImageDraw.Draw(picture)
        shape = draw.ellipse if kind == "circle" else draw.rectangle
        shape((left, top, left + 21, top + 21), fill=COLOURS[colour])
        picture.save(folder / "images" / f"{place}.png")
        said = (f"A {colour} {kind}.", f"there is one {kind}, it is {colour}")
        sentences = [{"raw": text, "sentid": 2 * place + i} for i, text in enumerate(said)]
        split = "test" if place % 5 == 4 else "train"
        images.append({"filename": f"{place}.png", "imgid": place, "split": split, "sentences": sentences})
    (folder / "dataset_shapes.json").write_text(json.dumps({"images": images, "dataset": "shapes"}))
    return folder


@pytest.fixture
def recipe(tmp_path: Path, bert_folder: Path) -> dict[str, Any]:
    source, shards = write_shapes(tmp_path / "source", 240), tmp_path / "shards"
    assert main(["data", "import", "karpathy", str(source), str(shards), "--quiet"]) == 0
    vision = {"name": "timm:test_vit", "pretrained": False, "image_size": 32}
    model = {
        "vision": vision,
        "text": {"name": f"hf:{bert_folder}"},
        "fusion": {"kind": "cross", "width": 32, "depth": 1, "heads": 2, "dropout": 0.0},
    }
    phase = {"epochs": 24, "batch_size": 16, "learning_rate": 4e-3, "objectives": ["labels"]}
    objectives = ["labels", "logits", {"kind": "cross_attention", "weight": 0.1}]
    return {
        "task": "captioning",
        "data": {"kind": "shards", "path": str(shards)},
        "student": model,
        "teacher": {"kind": "cvlm", **model, "fusion": {**model["fusion"], "heads": 4}},
        "phases": {
            "teacher": phase,
            "finetune": {**phase, "epochs": 1},
            "distill": {**phase, "objectives": objectives, "pairs": "all"},
        },
        "seeds": [0],
        "engine": {"device": "cpu"},
    }


def test_it_learns_to_say_what_it_sees(tmp_path: Path, recipe: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(captions, "has_java", lambda: False)
    (tmp_path / "recipe.yaml").write_text(yaml.safe_dump(recipe, sort_keys=False))
    run = tmp_path / "run"
    assert main(["run", str(tmp_path / "recipe.yaml"), "--out", str(run), "--quiet"]) == 0
    metrics = json.loads((run / "metrics.json").read_text())
    means = {arm: values["cider"]["mean"] for arm, values in metrics["arms"].items()}
    assert list(means) == ["majority", "teacher", "finetune", "distill"]
    assert metrics["metric"] == "cider"
    assert metrics["n"] == 48
    assert means["teacher"] > means["majority"] + 1
    assert means["distill"] > max(means["majority"] + 1, means["finetune"])
    low, high = metrics["arms"]["distill"]["bleu_4"]["ci95"]
    assert low <= metrics["arms"]["distill"]["bleu_4"]["mean"] <= high
    shown = json.loads((run / "distill" / "seed0" / "captions.json").read_text())
    assert len(shown) == 48
    right = sum(
        any(one["caption"] == said.lower().strip(".").replace(",", "") for said in one["references"]) for one in shown
    )
    assert right >= 40
    # The same numbers again from the saved model and the folder alone. Some of so few plain shapes look alike.
    shards = recipe["data"]["path"]
    bench = ["bench", str(run / "distill"), "--data", shards, "--allow-contaminated", "--quiet"]
    assert main([*bench, "--out", str(tmp_path / "b.json")]) == 0
    result = json.loads((tmp_path / "b.json").read_text())
    for name, metric in metrics["arms"]["distill"].items():
        assert result["metrics"][name]["mean"] == pytest.approx(metric["mean"], abs=1e-6)
    assert "papers print it times 100" in result["metrics"]["cider"]["definition"]
    assert result["settings"]["beam"] == 3


def test_an_objective_on_answers_is_refused(
    tmp_path: Path, recipe: dict[str, Any], capsys: pytest.CaptureFixture[str]
) -> None:
    recipe["phases"]["distill"]["objectives"] = ["similarity"]
    (tmp_path / "recipe.yaml").write_text(yaml.safe_dump(recipe, sort_keys=False))
    assert main(["run", str(tmp_path / "recipe.yaml"), "--out", str(tmp_path / "run"), "--quiet"]) != 0
    assert "objective 'similarity' needs similarity of the student" in capsys.readouterr().err
