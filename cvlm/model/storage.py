"""Saving and loading a CVLM the way the ecosystem expects: config.json, model.safetensors, answers.json, README.md.

Beside them stands training_data.json where it is known what the model was trained on, see `cvlm.lineage`.

A frozen encoder that was loaded by name is stored by reference: its name and the SHA-256 of its weights, checked when
the model is loaded. So a model is a few megabytes. `standalone=True` stores every tensor instead. Nothing is pickled.
"""

import json
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
from pydantic import ValidationError
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import nn

from cvlm.config import StudentSpec
from cvlm.encoders import fingerprint, is_frozen, load_text_encoder, load_vision_encoder, set_trainable
from cvlm.errors import CvlmError
from cvlm.lineage import TRAINING_DATA, UNTRAINED, read_record, write_record
from cvlm.model.cvlm import CVLM
from cvlm.model.text_only import TextClassifier

FORMAT = 1
CONFIG, WEIGHTS, ANSWERS, CARD = "config.json", "model.safetensors", "answers.json", "README.md"


def compose(
    spec: StudentSpec,
    *,
    task: str,
    answers: tuple[str, ...] = (),
    vision: nn.Module | None = None,
    text: nn.Module | None = None,
) -> CVLM:
    """Build an untrained CVLM from a specification; instances take the place of the encoders that it names.

    Raises:
        CvlmError: something in it is wrong, or a captioner's text encoder is not frozen.
    """
    model = _assemble(spec, task=task, answers=answers, vision=vision, text=text)
    if model.decoder is not None:
        if not is_frozen(model.text):
            raise CvlmError(f"task {task!r} lets the text encoder read each word once; set its train to frozen")
        model.decoder.read_vocabulary(model.text, model.answers)
    model.training_record = UNTRAINED
    return model


def _assemble(
    spec: StudentSpec, *, task: str, answers: tuple[str, ...], vision: nn.Module | None, text: nn.Module | None
) -> CVLM:
    text = text if text is not None else load_text_encoder(spec.text)
    if spec.vision is None:
        model: CVLM = TextClassifier(spec, task=task, text=text, answers=answers)
    else:
        vision = vision if vision is not None else load_vision_encoder(spec.vision)
        model = CVLM(spec, task=task, vision=vision, text=text, answers=answers)
    for tower in model.towers:
        encoder_spec = getattr(spec, tower)
        # An instance of the user's own class keeps what its owner froze; it is only ever frozen as a whole here.
        if encoder_spec.name != "custom" or encoder_spec.train == "frozen":
            set_trainable(getattr(model, tower), encoder_spec.train)
    return model


def save_model(model: CVLM, folder: str | Path, *, standalone: bool = False) -> None:
    """Write a model; the config comes last, so a folder without one is a save that did not finish.

    Args:
        model: the model.
        folder: made if missing; a model that stands there is replaced.
        standalone: store frozen encoders too, instead of a reference to them.

    Raises:
        CvlmError: the folder cannot be written.
    """
    folder = Path(folder)
    referenced = [] if standalone else [tower for tower in model.towers if _by_reference(model, tower)]
    own = {name: tensor for name, tensor in model.state_dict().items() if name.split(".")[0] not in referenced}
    # Copies, because safetensors refuses tensors that share memory, as tied weights do.
    state = {name: tensor.detach().cpu().clone(memory_format=torch.contiguous_format) for name, tensor in own.items()}
    config = {
        "model_type": "cvlm",
        "format": FORMAT,
        "task": model.task,
        "spec": json.loads(model.spec.model_dump_json()),
        "referenced_encoders": {tower: fingerprint(getattr(model, tower)) for tower in referenced},
    }
    try:
        folder.mkdir(parents=True, exist_ok=True)
        (folder / CONFIG).unlink(missing_ok=True)
        save_file(state, folder / WEIGHTS, metadata={"format": "pt"})
        (folder / ANSWERS).write_text(json.dumps(model.answers, ensure_ascii=False, indent=0), encoding="utf-8")
        (folder / CARD).write_text(model_card(model), encoding="utf-8")
        (folder / TRAINING_DATA).unlink(missing_ok=True)
        if model.training_record is not None and model.training_record.sources:
            write_record(folder, model.training_record)
        (folder / CONFIG).write_text(json.dumps(config, indent=2), encoding="utf-8")
    except (OSError, SafetensorError) as error:
        raise CvlmError(f"cannot write the model to {folder}: {error}") from error


def load_model(name: str | Path, *, vision: nn.Module | None = None, text: nn.Module | None = None) -> CVLM:
    """Load a model from a folder or the Hugging Face hub, in evaluation mode.

    Args:
        name: a folder written by `save_model`, or a hub repository.
        vision: the vision encoder, where the model was built with an instance of the user's own class.
        text: likewise for text.

    Raises:
        CvlmError: there is no complete model, an encoder has changed since, weights do not fit by name, or the record
            of training data is damaged.
    """
    folder = _locate(name)
    config = _read_config(folder)
    spec, referenced = config["spec"], config["referenced_encoders"]
    given = {"vision": vision, "text": text}
    towers = [tower for tower in given if getattr(spec, tower) is not None]
    for tower in towers:
        if given[tower] is None and getattr(spec, tower).name == "custom":
            raise CvlmError(
                f"{folder} was built with a {tower} encoder of your own class; pass it: from_pretrained({tower}=...)"
            )
    # Encoders whose weights stand in the file are built without loading theirs first.
    build_spec = spec.model_copy(
        update={tower: getattr(spec, tower).model_copy(update={"pretrained": tower in referenced}) for tower in towers}
    )
    model = _assemble(build_spec, task=config["task"], answers=_read_answers(folder), vision=vision, text=text)
    model.spec = spec
    for tower, expected in referenced.items():
        _check_reference(model, tower, expected, folder)
    _load_strictly(model, set(referenced), folder)
    model.training_record = read_record(folder)
    return model.eval()


def push_model(model: CVLM, repository: str, *, private: bool = False, standalone: bool = False) -> None:
    """Save a model to a temporary folder and upload it to the Hugging Face hub."""
    from huggingface_hub import HfApi

    with TemporaryDirectory() as folder:
        save_model(model, folder, standalone=standalone)
        api = HfApi()
        api.create_repo(repository, private=private, exist_ok=True)
        api.upload_folder(repo_id=repository, folder_path=folder)


def model_card(model: CVLM) -> str:
    """Return a short model card in the hub's format."""
    encoders = {tower: getattr(model.spec, tower) for tower in model.towers}
    named = "".join(f"- {tower} encoder: `{spec.name}` ({spec.train})\n" for tower, spec in encoders.items())
    fusion = model.spec.fusion
    shape = f"{fusion.kind}, width {fusion.width}, depth {fusion.depth}, {fusion.heads} heads"
    trained = sum(p.numel() for p in model.parameters() if p.requires_grad)
    return (
        "---\nlibrary_name: cvlm\ntags: [cvlm, vision-language]\n---\n\n"
        f"# A compositional vision-language model for {model.task}\n\n"
        f"{named}- fusion: {shape if model.spec.vision is not None else 'none, texts alone'}\n"
        f"- trained parameters: {trained:,}\n\n"
        "Load it with `cvlm.CVLM.from_pretrained(folder)`. The encoders keep their own licences.\n"
    )


def _by_reference(model: CVLM, tower: str) -> bool:
    """A tower is stored by reference when a name brings the same weights back: frozen, pretrained, not the user's.

    The specification must say frozen too: a teacher is frozen as a whole, also what it had trained before.
    """
    spec = getattr(model.spec, tower)
    return spec.name != "custom" and spec.pretrained and spec.train == "frozen" and is_frozen(getattr(model, tower))


def _locate(name: str | Path) -> Path:
    if Path(name).is_dir():
        return Path(name)
    if Path(name).exists() or str(name).count("/") != 1 or str(name).startswith((".", "/")):
        raise CvlmError(f"there is no model folder {str(name)!r}")
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError

    try:
        return Path(snapshot_download(str(name), allow_patterns=[CONFIG, WEIGHTS, ANSWERS, TRAINING_DATA]))
    except (HfHubHTTPError, HFValidationError, LocalEntryNotFoundError, OSError) as error:
        raise CvlmError(f"{str(name)!r} is no folder, and the hub did not give it: {error}") from error


def _read_config(folder: Path) -> dict[str, Any]:
    if not (folder / CONFIG).is_file():
        raise CvlmError(f"{folder} holds no {CONFIG}: it is no CVLM, or saving it did not finish")
    try:
        config = json.loads((folder / CONFIG).read_text(encoding="utf-8"))
        if config.get("model_type") != "cvlm" or config.get("format") != FORMAT:
            raise CvlmError(
                f"{folder / CONFIG} describes model_type {config.get('model_type')!r}, format {config.get('format')!r};"
                f" this version reads model_type 'cvlm', format {FORMAT}"
            )
        return {
            "task": config["task"],
            "referenced_encoders": dict(config["referenced_encoders"]),
            "spec": StudentSpec.model_validate(config["spec"]),
        }
    except KeyError as error:
        raise CvlmError(f"{folder / CONFIG} is damaged: it lacks the key {error}") from error
    except (ValueError, TypeError, AttributeError, ValidationError) as error:
        raise CvlmError(f"{folder / CONFIG} is damaged: {error}") from error


def _read_answers(folder: Path) -> tuple[str, ...]:
    try:
        return tuple(json.loads((folder / ANSWERS).read_text(encoding="utf-8")))
    except (OSError, ValueError) as error:
        raise CvlmError(f"{folder / ANSWERS} is missing or damaged: {error}") from error


def _check_reference(model: CVLM, tower: str, expected: str, folder: Path) -> None:
    found = fingerprint(getattr(model, tower))
    if found != expected:
        name = getattr(model.spec, tower).name
        raise CvlmError(
            f"{folder}: the {tower} encoder {name!r} is not the one this model was trained on (fingerprint "
            f"{found[:12]}, expected {expected[:12]}); install the version it was trained with, or save "
            "models with standalone=True"
        )


def _load_strictly(model: CVLM, referenced: set[str], folder: Path) -> None:
    try:
        state = load_file(folder / WEIGHTS)
    except (OSError, SafetensorError) as error:
        raise CvlmError(f"{folder / WEIGHTS} is missing or damaged: {error}") from error
    expected = {name for name in model.state_dict() if name.split(".")[0] not in referenced}
    missing, unexpected = sorted(expected - state.keys()), sorted(state.keys() - expected)
    if missing or unexpected:
        raise CvlmError(f"{folder / WEIGHTS} does not fit its config: missing {missing}, unexpected {unexpected}")
    try:
        model.load_state_dict(state, strict=False)
    except RuntimeError as error:
        raise CvlmError(f"{folder / WEIGHTS} does not fit its config: {error}") from error
