"""`cvlm bench` of models that CVLM did not build: dual encoders, and any object with the methods of a task."""

import json
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from data_files import write_gqa, write_nlvr2, write_snli_ve, write_vqav2
from PIL import Image
from tiny_duals import save_dual, save_open_clip

from benchmarks.metrics import retrieval_recall
from benchmarks.models import open_model
from benchmarks.runner import evaluate
from cvlm.cli.main import main
from cvlm.data import Examples, load_data
from cvlm.data.from_shards import ShardsData
from cvlm.data.importing import ImportSettings, import_data
from cvlm.errors import CvlmError
from cvlm.model import compose

Pairs = Callable[..., Examples]


@pytest.fixture(scope="module")
def duals(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """Dual encoders by the names that `cvlm bench` takes."""
    folder = tmp_path_factory.mktemp("duals")
    kinds = ("CLIP", "Siglip", "ChineseCLIP")
    names = {kind: str(save_dual(folder / kind, kind)) for kind in kinds}
    return {**names, "open_clip": f"open_clip:local-dir:{save_open_clip(folder / 'open_clip')}"}


def one_by_one(folder: str, kind: str, data: Examples) -> tuple[torch.Tensor, torch.Tensor]:
    """Embed without batches, straight through the library."""
    import transformers

    model = getattr(transformers, f"{kind}Model").from_pretrained(folder).eval()
    processor = getattr(transformers, f"{kind}Processor").from_pretrained(folder)
    padding = {"padding": "max_length", "max_length": 20} if kind == "Siglip" else {}
    with torch.no_grad():
        images = [
            model.get_image_features(**processor(images=p.load(), return_tensors="pt")).pooler_output
            for p in data.pictures
        ]
        tokens = [processor.tokenizer([text], return_tensors="pt", **padding) for text in data.texts]
        if kind == "Siglip":  # trained without a mask
            tokens = [{"input_ids": encoded["input_ids"]} for encoded in tokens]
        texts = [model.get_text_features(**encoded).pooler_output for encoded in tokens]
    return tuple(torch.nn.functional.normalize(torch.cat(rows), dim=-1) for rows in (images, texts))  # type: ignore[return-value]


@pytest.mark.parametrize("kind", ["CLIP", "Siglip", "ChineseCLIP"])
def test_transformers_dual_encoders(duals: dict[str, str], colour_pairs: Pairs, kind: str) -> None:
    data = colour_pairs(70)  # more than a batch
    images, texts = one_by_one(duals[kind], kind, data)
    opened = open_model(duals[kind], "cpu").methods  # type: ignore[union-attr]
    torch.testing.assert_close(opened.embed_texts(data.texts), texts, atol=2e-5, rtol=0)
    torch.testing.assert_close(opened.embed_images([p.load() for p in data.pictures]), images, atol=2e-5, rtol=0)
    result = evaluate(duals[kind], data=data)
    expected = retrieval_recall(images, texts, data.image_of)
    assert {name: metric["mean"] for name, metric in result["metrics"].items()} == pytest.approx(expected)
    assert (result["task"], result["model"], result["contamination"]) == ("retrieval", duals[kind], "unknown")
    assert result["settings"]["rerank"] == 0
    assert evaluate(f"hf:{duals[kind]}", data=data)["metrics"] == result["metrics"]
    assert not any(parameter.requires_grad for parameter in opened.model.parameters())
    assert not opened.model.training


def test_open_clip(duals: dict[str, str], colour_pairs: Pairs) -> None:
    import open_clip

    data = colour_pairs(70)
    name = duals["open_clip"].removeprefix("open_clip:")
    model, _, transform = open_clip.create_model_and_transforms(name)
    tokenize = open_clip.get_tokenizer(name)
    with torch.no_grad():
        images = torch.cat([model.encode_image(transform(p.load())[None], normalize=True) for p in data.pictures])
        texts = torch.cat([model.encode_text(tokenize([text]), normalize=True) for text in data.texts])
    result = evaluate(duals["open_clip"], data=data, folds=2)
    assert result["protocol"]["folds"] == 2
    halves = [retrieval_recall(images[h], texts[h], np.arange(35)) for h in (slice(0, 35), slice(35, 70))]
    for metric, value in result["metrics"].items():
        assert value["mean"] == pytest.approx((halves[0][metric] + halves[1][metric]) / 2)


class TestRefusedDuals:
    def test_a_task_of_answers(self, duals: dict[str, str], colour_vqa: Pairs) -> None:
        with pytest.raises(CvlmError, match=r"CLIP cannot be scored on vqa: that needs answer\. It serves retrieval\."):
            evaluate(duals["CLIP"], data=colour_vqa(6), task="vqa")

    def test_a_task_without_methods(self, duals: dict[str, str], colour_pairs: Pairs) -> None:
        with pytest.raises(CvlmError, match="only models that cvlm built are scored on it"):
            evaluate(duals["CLIP"], data=colour_pairs(6), task="itm")

    def test_a_text_model(self, bert_folder: Path, colour_pairs: Pairs) -> None:
        with pytest.raises(CvlmError, match="type 'bert', which embeds not both pictures and texts"):
            evaluate(f"hf:{bert_folder}", data=colour_pairs(6))

    def test_weights_that_are_missing(self, duals: dict[str, str], tmp_path: Path, colour_pairs: Pairs) -> None:
        from safetensors.torch import load_file, save_file

        for path in Path(duals["CLIP"]).iterdir():
            (tmp_path / path.name).write_bytes(path.read_bytes())
        state = load_file(tmp_path / "model.safetensors")
        del state["visual_projection.weight"]
        save_file(state, tmp_path / "model.safetensors", metadata={"format": "pt"})
        with pytest.raises(CvlmError, match=r"lacks 1 weights of CLIPModel: visual_projection\.weight; give"):
            evaluate(tmp_path, data=colour_pairs(6))

    def test_a_model_without_one_vector_per_picture(
        self, duals: dict[str, str], tmp_path: Path, colour_pairs: Pairs
    ) -> None:
        for path in Path(duals["Siglip"]).iterdir():
            (tmp_path / path.name).write_bytes(path.read_bytes())
        config = json.loads((tmp_path / "config.json").read_text())
        config["vision_config"]["vision_use_head"] = False
        (tmp_path / "config.json").write_text(json.dumps(config))
        with pytest.raises(CvlmError, match="gives features of shape None, not one vector each"):
            evaluate(tmp_path, data=colour_pairs(6))

    @pytest.mark.parametrize(
        ("name", "message"),
        [
            ("hf:./nowhere", "no folder './nowhere'; give a folder written by save_pretrained"),
            ("open_clip:ViT-B-99/x", "no open_clip model 'ViT-B-99'; did you mean"),
            ("open_clip:ViT-B-32", "open_clip has no weights '' of ViT-B-32; append one of /"),
        ],
    )
    def test_names(self, colour_pairs: Pairs, name: str, message: str) -> None:
        with pytest.raises(CvlmError, match=message):
            evaluate(name, data=colour_pairs(6))

    def test_a_run_folder_names_its_arms(self, tmp_path: Path) -> None:
        for arm in ("distill", "teacher"):
            (tmp_path / arm).mkdir()
            (tmp_path / arm / "config.json").write_text("{}")
        with pytest.raises(
            CvlmError, match=rf"is a run; say which of its arms: {tmp_path}/distill, {tmp_path}/teacher"
        ):
            evaluate(tmp_path, data="easy_vqa")

    def test_a_device_that_is_not_there(self, colour_pairs: Pairs) -> None:
        with pytest.raises(CvlmError, match="device 'cuda:77' cannot be used here"):
            evaluate("x:y", data=colour_pairs(6), device="cuda:77")


class Says:
    """Answers by the question alone."""

    def __init__(self, **said: str) -> None:
        self.said, self.shown = said, list[Any]()

    def answer(self, pictures: Sequence[Any], questions: Sequence[str]) -> list[str]:
        assert len(pictures) == len(questions) <= 64
        self.shown += pictures
        return [next(a for word, a in self.said.items() if word in question) for question in questions]


def imported(tmp_path: Path, data_format: str, source: Path, **settings: Any) -> Path:
    import_data(data_format, source, tmp_path / "out", ImportSettings(workers=1, min_count=1, **settings))
    return tmp_path / "out"


class TestGqa:
    """Exact match with the one answer, whether or not it is in the vocabulary."""

    @pytest.fixture
    def data(self, tmp_path: Path) -> Path:
        source = write_gqa(tmp_path / "src")
        path = source / "testdev_balanced_questions.json"
        questions = json.loads(path.read_text())
        questions["00070b"]["answer"] = "zebra"  # in no training question
        path.write_text(json.dumps(questions))
        return imported(tmp_path, "gqa", source)

    def test_free_answers(self, data: Path) -> None:
        accuracy = {
            said: evaluate(Says(Where=said, red="no"), data=data, task="vqa")["metrics"]["accuracy"]
            for said in ("left", "Left", "zebra")
        }
        assert {said: metric["mean"] for said, metric in accuracy.items()} == {
            "left": 7 / 8,
            "Left": 4 / 8,
            "zebra": 5 / 8,
        }
        assert accuracy["left"]["definition"] == "share of texts whose answer is the given one"

    def test_a_cvlm(self, data: Path, tiny_spec: Any, tmp_path: Path) -> None:
        test = load_data(ShardsData(kind="shards", path=data), "vqa").test
        model = compose(tiny_spec(), task="vqa", answers=test.answers)
        with torch.no_grad():  # answers "left" whatever it is shown
            model.answer_head.layers[-1].bias[test.answers.index("left")] += 100  # type: ignore[union-attr]
        model.save_pretrained(tmp_path / "model")
        result = evaluate(tmp_path / "model", data=data)
        assert (result["split"], result["n"]) == ("testdev", 8)
        assert result["metrics"]["accuracy"]["mean"] == 3 / 8
        assert result["by_type"]["question_type"]["query"]["n"] == 8
        assert result["by_type"]["answer_type"]["attr"]["share"] == 1.0


class TestOkVqa:
    """The official VQA accuracy over ten people's answers, of which eight agree about the colour and two add `Dark`."""

    @pytest.fixture
    def data(self, tmp_path: Path) -> Path:
        return imported(tmp_path, "okvqa", write_vqav2(tmp_path / "src", prefix=""))

    def test_free_answers(self, data: Path) -> None:
        result = evaluate(Says(color="The  dark red.", many="Two!"), data=data, task="vqa")
        accuracy = result["metrics"]["accuracy"]
        # "dark red" is two people's answer about three of six pictures; "2" and "two" are one answer, of eight people.
        assert accuracy["mean"] == pytest.approx((3 * 0.6 + 6 * 1.0) / 12)
        assert accuracy["definition"].startswith("official VQA accuracy")
        kinds = result["by_type"]["question_type"]
        assert {kind: (of["n"], of["share"]) for kind, of in kinds.items()} == {
            "how many": (6, 0.5),
            "what color": (6, 0.5),
        }
        assert kinds["what color"]["mean"] == pytest.approx(0.3)
        low, high = kinds["what color"]["ci95"]
        assert low < 0.3 < high
        assert kinds["how many"]["ci95"] == [1.0, 1.0]
        assert list(result["by_type"]["answer_type"]) == ["other"]

    def test_a_cvlm(self, data: Path, tiny_spec: Any) -> None:
        test = load_data(ShardsData(kind="shards", path=data), "vqa").test
        model = compose(tiny_spec(), task="vqa", answers=test.answers)
        with torch.no_grad():
            model.answer_head.layers[-1].bias[test.answers.index("2")] += 100  # type: ignore[union-attr]
        metric = evaluate(model, data=test)["metrics"]["accuracy"]
        assert metric["mean"] == 0.5
        assert metric["definition"].startswith("official VQA accuracy")


def test_nlvr2_shows_pairs(tmp_path: Path) -> None:
    model = Says(One="True", Both="no idea")
    result = evaluate(model, data=imported(tmp_path, "nlvr2", write_nlvr2(tmp_path / "src")), task="nlvr2")
    assert all(isinstance(left, Image.Image) and right.mode == "RGB" for left, right in model.shown)
    assert result["metrics"]["accuracy"]["mean"] == 0.5, "every second statement is true"
    assert result["metrics"]["accuracy"]["interval"] == "95 % bootstrap over statements"
    assert result["metrics"]["consistency"]["mean"] == 0.5
    assert result["by_type"] == {}


def test_snli_ve(tmp_path: Path) -> None:
    data = imported(tmp_path, "snli_ve", write_snli_ve(tmp_path / "src"))
    model = Says(entailment="Entailment", neutral="contradiction", contradiction="it contradicts")
    assert evaluate(model, data=data, task="snli_ve")["metrics"]["accuracy"]["mean"] == pytest.approx(1 / 3)


def test_an_object_on_labels_alone(colour_vqa: Pairs) -> None:
    data = replace(colour_vqa(12), types=tuple(f"kind {i % 2}" for i in range(12)))
    result = evaluate(Says(colo="red"), data=data, task="vqa")
    assert result["metrics"]["accuracy"]["mean"] == pytest.approx(4 / 12)
    assert result["settings"]["device"] == "its own"
    assert list(result["by_type"]["question_type"]) == ["kind 0", "kind 1"]


MODULE = """
import numpy as np
class Model:
    def embed_images(self, pictures): return np.array([np.asarray(p).mean((0, 1)) for p in pictures])
    def embed_texts(self, texts): return np.array([[len(t), t.count("e"), 1] for t in texts])
    def answer(self, pictures, questions): return ["red"] * len(questions)
class Half:
    def embed_images(self, pictures): return np.zeros((1, 3))
NUMBER = 3
"""


class TestModules:
    @pytest.fixture(autouse=True)
    def module(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.chdir(tmp_path)
        (tmp_path / f"{tmp_path.name}.py").write_text(MODULE)
        self.name = tmp_path.name

    def test_scored_from_the_command_line(self, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
        data = imported(tmp_path, "vqav2", write_vqav2(tmp_path / "src"))
        out = tmp_path / "r.json"
        command = ["bench", f"{self.name}:Model", "--data", str(data), "--out", str(out), "--quiet"]
        assert main(command) == 2
        assert "serves retrieval, vqa, nlvr2, snli_ve; say which one: --task retrieval" in capsys.readouterr().err
        assert main([*command, "--task", "vqa"]) == 0
        result = json.loads(out.read_text())
        assert result["metrics"]["accuracy"]["mean"] == pytest.approx(3 / 12)
        assert result["settings"]["data"] == str(data)
        assert "contamination: unknown" in capsys.readouterr().out

    @pytest.mark.parametrize(
        ("name", "message"),
        [
            ("{}:model", r"unknown callable in .* 'model' \(did you mean 'Model'\?\)"),
            ("{}:NUMBER", "unknown callable in .* 'NUMBER'"),
            ("{}x:Model", "cannot import the module of .*x:Model' from"),
            (
                "{}:Half",
                "gave a Half, which has the methods of no task. They are retrieval: embed_images, embed_texts;",
            ),
        ],
    )
    def test_refused(self, name: str, message: str) -> None:
        with pytest.raises(CvlmError, match=message):
            evaluate(name.format(self.name), data="easy_vqa")


class Wrong:
    """Gives what it was made with."""

    def __init__(self, images: Any = None, texts: Any = None, answers: Any = None) -> None:
        self.images, self.texts, self.answers = images, texts, answers

    def embed_images(self, pictures: Sequence[Any]) -> Any:
        return np.ones((len(pictures), 3)) if self.images is None else self.images

    def embed_texts(self, texts: Sequence[str]) -> Any:
        return torch.ones(len(texts), 3) if self.texts is None else self.texts(len(texts))

    def answer(self, pictures: Sequence[Any], questions: Sequence[str]) -> Any:
        return self.answers


@pytest.mark.parametrize(
    ("model", "message"),
    [
        (Wrong(images=np.ones((9, 3))), r"embed_images of 1 items gave float64 \(9, 3\); it must be \[1, d\]"),
        (Wrong(images=[["a"]]), r"gave <U1 \(1, 1\)"),
        (Wrong(images=[[1.0, np.nan, 1.0]]), "embed_images gave numbers that are not finite"),
        (Wrong(texts=lambda n: np.ones((n, 4))), "pictures in 3 numbers and texts in 4"),
    ],
)
def test_embeddings_that_are_none(colour_pairs: Pairs, model: Wrong, message: str) -> None:
    with pytest.raises(CvlmError, match=message):
        evaluate(model, data=colour_pairs(6), task="retrieval")


@pytest.mark.parametrize(
    ("answers", "message"),
    [
        ("red", "answer of 1 questions gave 'red'; it must be 1 texts"),
        ([], "answer of 1 questions gave"),
        ([3], "3, which is no text"),
    ],
)
def test_answers_that_are_none(colour_vqa: Pairs, answers: Any, message: str) -> None:
    with pytest.raises(CvlmError, match=message):
        evaluate(Wrong(answers=answers), data=colour_vqa(6), task="vqa")
