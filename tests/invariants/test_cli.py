"""What a user meets: clear refusals, light start-up, commands that do what their help says."""

import json
import os
import resource
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import yaml
from PIL import Image

from cvlm.cli.main import main

TINY = {
    "task": "vqa",
    "data": {"kind": "easy_vqa", "limit": 64, "labelled": 0.5},
    "student": {
        "vision": {"name": "package:efficientnet_lite0", "image_size": 32, "layer": 3},
        "text": {"name": "package:minilm_l6"},
        "fusion": {"kind": "cross", "width": 32, "depth": 1, "heads": 4},
    },
    "phases": {"finetune": {"epochs": 1, "batch_size": 16, "objectives": ["labels"]}},
    "seeds": [0],
    "engine": {"device": "cpu"},
}


def write_recipe(folder: Path, **changes) -> Path:
    path = folder / "recipe.yaml"
    path.write_text(yaml.safe_dump({**TINY, **changes}, sort_keys=False))
    return path


def own_data(folder: Path, answer: str = "red", test_lines: int = 2) -> dict:
    folder.mkdir()
    pixels = np.random.default_rng(0).integers(0, 255, (40, 40, 3), dtype=np.uint8)
    Image.fromarray(pixels).save(folder / "a.png")
    good = [{"image": "a.png", "text": "what color?", "answer": a} for a in ("red", "blue")]
    (folder / "train.jsonl").write_text("\n".join(json.dumps(row) for row in good * 8))
    test = [{"image": "a.png", "text": "what color?", "answer": answer}] * test_lines
    (folder / "test.jsonl").write_text("\n".join(json.dumps(row) for row in test))
    return {"kind": "jsonl", "path": str(folder)}


def student(**changes) -> dict:
    base = json.loads(json.dumps(TINY["student"]))
    for key, value in changes.items():
        base[key] |= value
    return base


def refused_run(tmp_path, capfd, message, overrides=(), **changes):
    """Run a recipe that must be refused: exit code 2, the message, no traceback, nothing written."""
    out = tmp_path / "run"
    code = main(["run", str(write_recipe(tmp_path, **changes)), *overrides, "--out", str(out), "--quiet"])
    captured = capfd.readouterr()
    assert code == 2
    assert message in captured.err, captured.err
    assert "Traceback" not in captured.err
    assert not out.exists()
    return captured.err


def test_an_unknown_key_names_the_nearest(tmp_path, capfd):
    changed = {"finetune": {"epoch": 3, "objectives": ["labels"]}}
    error = refused_run(tmp_path, capfd, "phases.finetune.epoch: unknown key; did you mean 'epochs'?", phases=changed)
    assert len(error.splitlines()) == 2


def test_a_misspelt_encoder_names_the_nearest(tmp_path, capfd):
    wrong = student(vision={"name": "package:eficientnet_lite0"})
    refused_run(tmp_path, capfd, "efficientnet_lite0", student=wrong)


def test_a_wrong_type_says_what_was_given(tmp_path, capfd):
    refused_run(tmp_path, capfd, "seeds", overrides=["seeds=many"])


def test_every_error_of_a_file_is_reported_at_once(tmp_path, capfd):
    error = refused_run(tmp_path, capfd, "3 problem(s)", overrides=["seed=[1]", "engine.precision=int3", "task=vqaa"])
    assert error.count("\n  - ") == 3


def test_a_missing_recipe(tmp_path, capfd):
    assert main(["run", str(tmp_path / "none.yaml"), "--out", str(tmp_path / "run")]) == 2
    assert "cannot read the recipe" in capfd.readouterr().err


def test_a_missing_image(tmp_path, capfd):
    data = own_data(tmp_path / "data")
    (tmp_path / "data" / "a.png").unlink()
    refused_run(tmp_path, capfd, "names the image 'a.png', which is not in", data=data)


def test_an_answer_outside_the_vocabulary(tmp_path, capfd):
    data = own_data(tmp_path / "data", answer="blu")
    refused_run(
        tmp_path, capfd, "the answer 'blu' is outside the vocabulary of 2 answers (did you mean 'blue'?)", data=data
    )


def test_an_empty_split(tmp_path, capfd):
    refused_run(tmp_path, capfd, "the test split of data is empty", data=own_data(tmp_path / "data", test_lines=0))


def test_a_width_that_heads_do_not_divide(tmp_path, capfd):
    wrong = student(fusion={"width": 30, "heads": 4})
    refused_run(tmp_path, capfd, "width 30 is not divisible by heads 4", student=wrong)


def test_a_teacher_without_a_needed_field_is_refused_by_both_names(tmp_path, capfd):
    phases = {
        "teacher": TINY["phases"]["finetune"],
        "finetune": TINY["phases"]["finetune"],
        "distill": {"objectives": ["labels", "cross_attention"], "epochs": 1},
    }
    teacher = {**student(fusion={"kind": "none"}), "kind": "cvlm"}
    error = refused_run(
        tmp_path, capfd, "objective 'cross_attention' needs text_to_image", phases=phases, teacher=teacher
    )
    assert "the teacher cvlm, which gives" in error


@pytest.mark.skipif(os.geteuid() != 0, reason="needs a file where a folder should be, for root too")
def test_an_output_folder_that_cannot_be_written(tmp_path, capfd):
    (tmp_path / "run").write_text("a file")
    code = main(["run", str(write_recipe(tmp_path)), "--out", str(tmp_path / "run" / "deeper"), "--quiet"])
    assert code == 2
    assert "cannot write to the run folder" in capfd.readouterr().err


def test_a_truncated_image_that_is_not_the_first(tmp_path, capfd):
    folder = tmp_path / "data"
    data = own_data(folder)
    (folder / "b.png").write_bytes((folder / "a.png").read_bytes()[:400])
    with (folder / "train.jsonl").open("a") as file:
        file.write('\n{"image": "b.png", "text": "what color?", "answer": "red"}')
    refused_run(tmp_path, capfd, f"cannot decode the image {folder / 'b.png'}", data=data)


def test_a_run_folder_of_another_recipe(tmp_path, capfd):
    out = tmp_path / "run"
    out.mkdir()
    (out / "recipe.yaml").write_text("task: other")
    code = main(["run", str(write_recipe(tmp_path)), "--out", str(out), "--quiet"])
    assert code == 2
    assert "holds a run of another recipe" in capfd.readouterr().err


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["build", "--vision", "timm:test_vitt", "--text", "package:minilm_l6", "--task", "retrieval"], "test_vit"),
        (["build", "--vision", "tim:test_vit", "--text", "package:minilm_l6", "--task", "retrieval"], "timm"),
        (["build", "--vision", "package:efficientnet_lite0", "--text", "package:minilm_l6", "--task", "vqa"], "answer"),
    ],
)
def test_build_refuses(tmp_path, capfd, arguments, message):
    assert main([*arguments, "--out", str(tmp_path / "model")]) == 2
    assert message in capfd.readouterr().err
    assert not (tmp_path / "model").exists()


def test_build_then_bench(tmp_path, capfd):
    answers = tmp_path / "answers.txt"
    answers.write_text("red\nblue\n")
    encoders = ["--vision", "package:efficientnet_lite0", "--text", "package:minilm_l6"]
    model = str(tmp_path / "model")
    assert main(["build", *encoders, "--task", "vqa", "--answers", str(answers), "--out", model]) == 0
    data = tmp_path / "data"
    own_data(data)
    (data / "b.png").write_bytes((data / "a.png").read_bytes())
    rows = [{"image": f"{i}.png", "text": "what color?", "answer": answer} for i in "ab" for answer in ("red", "blue")]
    (data / "test.jsonl").write_text("\n".join(map(json.dumps, rows)))
    result = tmp_path / "result.json"
    assert main(["bench", model, "--data", str(data), "--out", str(result), "--quiet"]) == 0
    content = json.loads(result.read_text())
    assert content["n"] == 4
    assert content["metrics"]["accuracy"]["mean"] == 0.5, "one of the two answers is right on each picture"
    assert main(["bench", model, "--data", str(data), "--task", "retrieval", "--quiet"]) == 2
    assert "was built for task 'vqa', not 'retrieval'" in capfd.readouterr().err


@pytest.mark.parametrize("what", ["encoders", "fusions", "objectives", "teachers", "tasks", "formats"])
def test_list_prints_a_table(what, capfd):
    assert main(["list", what]) == 0
    assert len(capfd.readouterr().out.splitlines()) > 3


def run_python(*arguments: str) -> tuple[float, str]:
    """Return the processor's seconds, which a busy machine does not change, and what was printed."""
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    done = subprocess.run([sys.executable, *arguments], capture_output=True, text=True, check=True)
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    return after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime, done.stdout


def test_import_is_light():
    code = "import cvlm, sys; print('torch' in sys.modules, 'transformers' in sys.modules)"
    seconds, out = min(run_python("-c", code) for _ in range(3))
    assert out.split() == ["False", "False"]
    assert seconds < 0.5


def test_help_is_quick():
    seconds, out = min(run_python("-m", "cvlm.cli.main", "--help") for _ in range(3))
    assert seconds < 1.0
    assert "COMMAND" in out
