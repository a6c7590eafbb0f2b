"""Objectives on answers, attention and relations through a recipe, from stored targets and from a live teacher."""

import json
import math

import pytest
import yaml
from safetensors import safe_open

from cvlm.cli.main import main

TOWERS = {
    "vision": {"name": "package:efficientnet_lite0", "image_size": 64, "layer": 3},
    "text": {"name": "package:minilm_l6"},
}
ANSWERS = [
    "labels",
    "jsd",
    {"kind": "jsd", "beta": 0.0, "normalise": "z_score"},
    "reverse_kl",
    "symmetric_kl",
    "tvd",
    "logit_mse",
    "top_k",
    "dkd",
    "ranking",
    "focal",
    {"kind": "entropy", "weight": 0.1},
    {"kind": "cross_attention", "divergence": "cosine"},
    {"kind": "value_relation", "relations": ["attention", "values"]},
]
HEADS = [
    "labels",
    {"kind": "cross_attention", "heads": "best"},
    {"kind": "cross_attention", "heads": "learned", "layers": [[0, 0]]},
    {"kind": "value_relation", "relation_heads": 8},
]


@pytest.mark.parametrize(("objectives", "stored"), [(ANSWERS, True), (HEADS, False)], ids=["answers", "heads"])
def test_recipes_with_these_objectives(tmp_path, objectives, stored):
    """Student and teacher differ in width, depth, heads and fusion kind. Attention head by head cannot be stored."""
    phase = {"epochs": 4, "batch_size": 16, "pairs": "all"}
    recipe = {
        "task": "vqa",
        "data": {"kind": "easy_vqa", "limit": 48, "labelled": 0.5},
        "student": {**TOWERS, "fusion": {"kind": "cross", "width": 32, "depth": 1, "heads": 4}},
        "teacher": {
            "kind": "cvlm",
            **TOWERS,
            "vision": {**TOWERS["vision"], "image_size": 96},
            "fusion": {"kind": "merged", "width": 48, "depth": 2, "heads": 6},
        },
        "phases": {
            "teacher": {"epochs": 2, "batch_size": 16, "objectives": ["focal"]},
            "distill": {**phase, "objectives": objectives},
        },
        "seeds": [0],
        "engine": {"device": "cpu"},
    }
    (tmp_path / "recipe.yaml").write_text(yaml.safe_dump(recipe, sort_keys=False))
    run = tmp_path / "run"
    assert main(["run", str(tmp_path / "recipe.yaml"), "--out", str(run), "--quiet"]) == 0
    log = json.loads((run / "distill" / "seed0" / "log.json").read_text())
    terms = [name for name in log[-1] if name.startswith("term/")]
    assert len(terms) == len(objectives)
    assert all(math.isfinite(entry[name]) for entry in log for name in terms)
    assert log[-1]["loss"] < log[0]["loss"]
    relation = next(name for name in terms if "value_relation" in name)
    assert log[-1][relation] < log[0][relation]
    kept = {path.name for folder in (run / "targets").glob("*") for path in folder.glob("*.npy")}
    assert ("values-1.npy" in kept) == stored
    with safe_open(run / "distill" / "model.safetensors", "pt") as weights:
        assert not any("mixes" in name or "objectives" in name for name in weights.keys())  # noqa: SIM118
