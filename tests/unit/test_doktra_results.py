"""The documentation shows the committed results of the DoKTra recipe, and they are of the shipped recipe."""

import json
import re
from pathlib import Path

import pytest

from cvlm.config import load_recipe

ROOT = Path(__file__).parents[2]
FOLDER = ROOT / "benchmarks" / "results" / "doktra"
METRICS = json.loads((FOLDER / "metrics.json").read_text(encoding="utf-8"))
SECTION = (ROOT / "docs" / "concepts.md").read_text(encoding="utf-8").split("## DoKTra\n")[1].split("\n## ")[0]


@pytest.mark.parametrize("arm", METRICS["arms"])
def test_every_arm(arm):
    score = METRICS["arms"][arm]["accuracy"]
    low, high = score["ci95"]
    assert f"| `{arm}` | {100 * score['mean']:.1f} % ({100 * low:.1f} to {100 * high:.1f}) |" in SECTION


@pytest.mark.parametrize(
    ("arm", "name", "sign"), [("doktra", "doktra_vs_labels_longer", 1), ("finetune", "labels_longer_vs_finetune", -1)]
)
def test_differences(arm, name, sign):
    found = METRICS["comparisons"][name]
    low, high = sorted(100 * sign * bound for bound in found["ci95"])
    (line,) = re.findall(rf"^\| `{arm}` .*$", SECTION, re.MULTILINE)
    assert line.endswith(f"| {100 * sign * found['difference']:+.1f} ({low:+.1f} to {high:+.1f}) |".replace("(+", "("))


def test_the_verdict_and_the_recipe():
    assert METRICS["comparisons"]["doktra_vs_labels_longer"]["ci95"][1] < 0
    low, high = METRICS["comparisons"]["doktra_vs_finetune"]["ci95"]
    assert low < 0 < high
    assert load_recipe(FOLDER / "recipe.yaml") == load_recipe(ROOT / "configs" / "recipes" / "doktra.yaml")
