"""`cvlm run`, then `cvlm bench` of what it trained: the record of the training data, and the guard that reads it."""

import json
from pathlib import Path

import pytest
import yaml
from data_files import write_picture

from cvlm.cli.main import main

TOWERS = {
    "vision": {"name": "package:efficientnet_lite0", "image_size": 32, "layer": 3},
    "text": {"name": "package:minilm_l6"},
}
RECIPE = {
    "task": "vqa",
    "student": {**TOWERS, "fusion": {"kind": "cross", "width": 32, "depth": 1, "heads": 4}},
    "teacher": {"kind": "cvlm", **TOWERS, "fusion": {"kind": "cross", "width": 32, "depth": 1, "heads": 4}},
    "phases": {
        "teacher": {"epochs": 1, "batch_size": 16, "objectives": ["labels"]},
        "finetune": {"epochs": 1, "batch_size": 16, "objectives": ["labels"]},
        "distill": {"epochs": 1, "batch_size": 16, "pairs": "all", "objectives": ["labels", "logits"]},
    },
    "seeds": [0],
    "engine": {"device": "cpu"},
}


def write_data(folder: Path, split: str, first: int, number: int) -> None:
    rows = []
    for seed in range(first, first + number):
        write_picture(folder / f"{seed}.png", seed, (40, 32))
        rows += [{"image": f"{seed}.png", "text": "what is it?", "answer": ("this", "that")[seed % 2]}]
    (folder / f"{split}.jsonl").write_text("\n".join(map(json.dumps, rows)))


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """A small run, and its data: twelve training pictures, of which one is a test picture too."""
    data, out = tmp_path_factory.mktemp("data"), tmp_path_factory.mktemp("runs") / "run"
    write_data(data, "train", 0, 12)
    write_data(data, "test", 11, 5)
    recipe = data / "recipe.yaml"
    recipe.write_text(yaml.safe_dump({**RECIPE, "data": {"kind": "jsonl", "path": str(data)}}, sort_keys=False))
    assert main(["run", str(recipe), "--out", str(out), "--quiet"]) == 0
    return out, data


def test_every_arm_says_what_it_was_trained_on(run: tuple[Path, Path]) -> None:
    out, data = run
    used = {}
    for arm in ("teacher", "finetune", "finetune/seed0", "distill"):
        record = json.loads((out / arm / "training_data.json").read_text())
        (source,) = record["sources"]
        assert (source["data"], source["split"], len(source["pictures"]), record["unknown"]) == (
            data.name,
            "train",
            12,
            [],
        )
        used[arm] = set(source["used_by"])
    assert used["teacher"] == {"teacher"}
    assert used["finetune"] == used["finetune/seed0"] == {"finetune"}
    assert used["distill"] == {"teacher", "finetune", "distill"}


def test_the_report_says_what_its_splits_share(run: tuple[Path, Path]) -> None:
    stamp = json.loads((run[0] / "metrics.json").read_text())["contamination"]
    assert (stamp["verdict"], stamp["pictures"]) == ("contaminated", 1)
    assert stamp["examples"] == ["picture 11.png"]


def test_bench_refuses_what_was_trained_on(
    run: tuple[Path, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out, data = run
    result = tmp_path / "result.json"
    command = ["bench", str(out / "distill"), "--data", str(data), "--out", str(result), "--quiet"]
    assert main(command) == 2
    said = capsys.readouterr().err
    assert f"1 of 5 pictures and 0 of 5 texts of {data.name} (test) stand in the training data" in said
    assert not result.exists()
    assert main([*command, "--split", "train"]) == 2
    assert "12 of 12 pictures" in capsys.readouterr().err
    assert main([*command, "--allow-contaminated"]) == 0
    assert "contamination: CONTAMINATED; 1 pictures" in capsys.readouterr().out
    stored = json.loads(result.read_text())
    assert stored["contamination"]["verdict"] == "contaminated"
    assert stored["checkpoint"] == "last step of the phase; no selection on the scored split"


def test_bench_of_new_data(run: tuple[Path, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    write_data(tmp_path, "train", 0, 12)
    write_data(tmp_path, "test", 50, 6)
    result = tmp_path / "result.json"
    assert main(["bench", str(run[0] / "finetune"), "--data", str(tmp_path), "--out", str(result), "--quiet"]) == 0
    assert json.loads(result.read_text())["contamination"]["verdict"] == "clean"
    assert "contamination: clean" in capsys.readouterr().out


def test_bench_of_a_run_folder_names_its_arms(run: tuple[Path, Path], capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["bench", str(run[0]), "--data", "easy_vqa"]) == 2
    said = capsys.readouterr().err
    assert all(str(run[0] / arm) in said for arm in ("distill", "finetune", "teacher"))
