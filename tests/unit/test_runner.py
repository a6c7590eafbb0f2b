"""Scoring a saved or loaded model on any data."""

import json
from collections.abc import Callable
from dataclasses import replace
from datetime import datetime
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from benchmarks.result_files import write_result
from benchmarks.runner import AS_GIVEN, evaluate
from benchmarks.summary import METRIC_DEFINITIONS
from cvlm.cli.main import main
from cvlm.config import StudentSpec
from cvlm.data import UNLABELLED, Examples
from cvlm.errors import CvlmError
from cvlm.model import CVLM, compose

ANSWERS = ("red", "green", "blue")
Make = Callable[..., StudentSpec]
Data = Callable[..., Examples]


def build(spec: StudentSpec, task: str = "vqa") -> CVLM:
    torch.manual_seed(0)
    return compose(spec, task=task, answers=ANSWERS if task == "vqa" else ())


def logits_of(model: Any, data: Examples) -> np.ndarray:
    pictures = [data.pictures[i].load() for i in data.image_of]
    texts = [data.texts[i] for i in data.text_of]
    with torch.no_grad():
        result: np.ndarray = model.eval()(model.vision.prepare(pictures), model.text.prepare(texts)).logits.numpy()
    return result


@pytest.mark.parametrize("train", ["frozen", "full"])
def test_vqa_on_examples_in_memory(tiny_spec: Make, colour_vqa: Data, train: str) -> None:
    model, data = build(tiny_spec(vision={"train": train}, text={"train": train})), colour_vqa(14, "test")
    steps: list[tuple[int, int]] = []
    result = evaluate(model, data=data, progress=lambda done, total: steps.append((done, total)))
    expected = (logits_of(model, data).argmax(-1) == data.labels).mean()
    accuracy = result["metrics"]["accuracy"]
    assert accuracy["mean"] == pytest.approx(expected)
    assert accuracy["ci95"][0] <= expected <= accuracy["ci95"][1]
    assert accuracy["definition"] == METRIC_DEFINITIONS["accuracy"]
    shown = {name: result[name] for name in ("model", "task", "data", "split", "n")}
    assert shown == {"model": "(in memory)", "task": "vqa", "data": "colours", "split": "test", "n": 14}
    assert result["data_fingerprint"] == data.fingerprint
    bootstrap = {"resamples": 5000, "resamples_per_type": 1000, "seed": 0}
    assert result["settings"] == {"device": "cpu", "bootstrap": bootstrap}
    assert (result["checkpoint"], result["contamination"]) == (AS_GIVEN, "unknown")
    assert accuracy["interval"] == "95 % bootstrap over pictures"
    assert {"cvlm", "torch", "transformers", "timm", "open_clip_torch", "numpy", "python"} <= result["versions"].keys()
    assert result["machine"]["cores"] >= 1
    assert datetime.fromisoformat(result["date"]).tzinfo is not None
    # Trained towers are kept like frozen ones while a model is scored, and are as trainable as before afterwards.
    assert (14, 14) in steps
    assert all(parameter.requires_grad == (train == "full") for parameter in model.vision.parameters())
    json.dumps(result)


@pytest.mark.parametrize(("kind", "rerank"), [("none", 0), ("cross", 3)])
def test_retrieval(tiny_spec: Make, colour_pairs: Data, kind: str, rerank: int) -> None:
    result = evaluate(build(tiny_spec(kind), "retrieval"), data=colour_pairs(12), rerank=3)
    assert set(result["metrics"]) == {name for name in METRIC_DEFINITIONS if "recall" in name}
    assert result["settings"]["rerank"] == rerank
    assert (result["settings"]["folds"], result["settings"]["exhaustive_sample"]) == (1, 64 if rerank else 0)
    for way in ("text_to_image", "image_to_text"):
        one, five, ten = (result["metrics"][f"{way}_recall@{k}"]["mean"] for k in (1, 5, 10))
        assert 0 <= one <= five <= ten <= 1


def test_reranking_everything_orders_by_match_and_similarity(tiny_spec: Make, colour_pairs: Data) -> None:
    model, data = build(tiny_spec("co_attention"), "retrieval").eval(), colour_pairs(6)
    assert model.matching_head is not None
    with torch.no_grad():
        model.matching_head.layers[-1].weight *= 30  # type: ignore[operator]  # scores that rounding cannot reorder
    result = evaluate(model, data=data, rerank=6)
    vision, text = model.vision, model.text
    images = vision.prepare([picture.load() for picture in data.pictures])  # type: ignore[operator]
    hits = []
    with torch.no_grad():
        for i in range(6):
            texts = text.prepare([data.texts[i]] * 6)  # type: ignore[operator]
            similarity = model(images, texts).similarity[:, 0]
            hits.append(int((model.match(images, texts) + similarity).argmax()) == i)
    assert result["metrics"]["text_to_image_recall@1"]["mean"] == pytest.approx(np.mean(hits))


@pytest.fixture
def folder(tmp_path: Path, colour_vqa: Data) -> Path:
    """The same questions as a folder of the user's own; the picture files stand beside them already."""
    for split in ("train", "test"):
        data = colour_vqa(9 if split == "train" else 6, split)
        rows = [
            {"image": f"{split}{image}.png", "text": data.texts[text], "answer": data.answers[label]}
            for image, text, label in zip(data.image_of, data.text_of, data.labels, strict=True)
        ]
        (tmp_path / f"{split}.jsonl").write_text("\n".join(map(json.dumps, rows)), encoding="utf-8")
    return tmp_path


def test_a_saved_model_on_a_folder(tiny_spec: Make, folder: Path) -> None:
    model = compose(tiny_spec(), task="vqa", answers=tuple(sorted(ANSWERS)))
    model.save_pretrained(folder / "model")
    by_name = evaluate(folder / "model", data=folder, task="vqa")
    assert (by_name["model"], by_name["n"], by_name["split"]) == (str(folder / "model"), 6, "test")
    spec = {"kind": "jsonl", "path": str(folder), "answers": sorted(ANSWERS)}
    assert evaluate(str(folder / "model"), data=spec)["metrics"] == by_name["metrics"]
    assert evaluate(folder / "model", data=str(folder), split="train")["n"] == 9


class TestRefused:
    def test_another_task(self, tiny_spec: Make, colour_vqa: Data) -> None:
        with pytest.raises(CvlmError, match=r"model \(in memory\) was built for task 'vqa', not 'retrieval'"):
            evaluate(build(tiny_spec()), data=colour_vqa(6), task="retrieval")

    def test_data_of_another_task(self, tiny_spec: Make) -> None:
        message = r"'openmoji' is made for task retrieval, itm, .*, not for 'vqa'; take other data, or a model or"
        with pytest.raises(CvlmError, match=message) as caught:
            evaluate(build(tiny_spec()), data="openmoji")
        assert "recipe says" not in str(caught.value)

    @pytest.mark.parametrize(
        ("settings", "options"),
        [
            ({"folds": 1}, "--folds 1"),
            ({"rerank": "all"}, "--rerank all"),
            ({"rerank": 0, "exhaustive_sample": 8}, "--rerank 0 and --exhaustive-sample 8"),
        ],
    )
    def test_settings_of_another_task(
        self, tiny_spec: Make, colour_vqa: Data, settings: dict[str, Any], options: str
    ) -> None:
        message = f"^{options}: that is for retrieval, and the model is scored on 'vqa'; leave it out$"
        with pytest.raises(CvlmError, match=message):
            evaluate(build(tiny_spec()), data=colour_vqa(6), **settings)

    @pytest.mark.parametrize(("options", "code"), [([], 0), (["--folds", "2"], 2), (["--rerank", "3"], 2)])
    def test_on_the_command_line(
        self, tiny_spec: Make, folder: Path, capsys: pytest.CaptureFixture[str], options: list[str], code: int
    ) -> None:
        compose(tiny_spec(), task="vqa", answers=tuple(sorted(ANSWERS))).save_pretrained(folder / "model")
        assert main(["bench", str(folder / "model"), "--data", str(folder), "--quiet", *options]) == code
        assert ("that is for retrieval" in capsys.readouterr().err) == (code == 2)

    def test_an_unknown_split(self, tiny_spec: Make, folder: Path) -> None:
        with pytest.raises(CvlmError, match=r"split is 'val'; use train or test"):
            evaluate(build(tiny_spec()), data=folder, split="val")

    @pytest.mark.parametrize("answers", [("red", "green"), ("green", "red", "blue")])
    def test_other_answers(self, tiny_spec: Make, colour_vqa: Data, answers: tuple[str, ...]) -> None:
        model = compose(tiny_spec(), task="vqa", answers=answers)
        with pytest.raises(CvlmError, match=rf"answers over {len(answers)} answers, the data colours over 3, or in an"):
            evaluate(model, data=colour_vqa(6))

    def test_questions_without_an_answer(self, tiny_spec: Make, colour_vqa: Data) -> None:
        data = colour_vqa(6)
        data = replace(data, labels=np.where(np.arange(6) < 2, UNLABELLED, data.labels))
        with pytest.raises(CvlmError, match=r"2 of 6 texts of colours \(train\) have no answer to score"):
            evaluate(build(tiny_spec()), data=data)

    def test_one_picture(self, tiny_spec: Make, colour_vqa: Data) -> None:
        with pytest.raises(CvlmError, match=r"colours \(train\) shows one picture; a score needs at least 2"):
            evaluate(build(tiny_spec()), data=colour_vqa(2))

    @pytest.mark.parametrize(
        ("data", "message"),
        [
            ("nowhere", r"data 'nowhere' is neither .* kind: Input tag .*'easy_vqa', 'openmoji', .*'jsonl'"),
            ({"kind": "jsonl", "pth": "x"}, r"nor a data kind: path: Field required; pth: Extra inputs"),
            ({}, r"data \{\} is neither"),
        ],
    )
    def test_what_is_no_data(self, tiny_spec: Make, data: Any, message: str) -> None:
        with pytest.raises(CvlmError, match=message):
            evaluate(build(tiny_spec()), data=data)

    def test_no_model(self, tmp_path: Path) -> None:
        with pytest.raises(CvlmError, match="there is no model folder"):
            evaluate(tmp_path / "nothing", data="easy_vqa")


def test_results_are_written_whole_or_not_at_all(tmp_path: Path) -> None:
    write_result({"n": 3}, tmp_path / "deep" / "result.json")
    assert json.loads((tmp_path / "deep" / "result.json").read_text()) == {"n": 3}
    assert [path.name for path in (tmp_path / "deep").iterdir()] == ["result.json"]
    with pytest.raises(CvlmError, match=r"cannot write the result to .*result\.json"):
        write_result({}, tmp_path / "deep" / "result.json" / "again.json")
