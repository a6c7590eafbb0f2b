"""Teachers by name. The table holds strings, so importing it costs nothing; a teacher's module loads when asked for."""

import difflib
import importlib
import inspect
import json
from collections.abc import Callable
from pathlib import Path
from types import FunctionType
from typing import Any

from distill.errors import DistillError
from distill.teachers.base import Teacher

TEACHERS: dict[str, str] = {
    "cvlm": "cvlm.training.teacher:load_cvlm_teacher",
    "flava": "distill.teachers.flava:FlavaTeacher",
    "vilt": "distill.teachers.vilt:ViltTeacher",
    "blip": "distill.teachers.blip:load_blip",
    "bridgetower": "distill.teachers.bridgetower:BridgeTowerTeacher",
    "git": "distill.teachers.git:GitTeacher",
    "clip": "distill.teachers.dual:ClipTeacher",
    "siglip": "distill.teachers.dual:SiglipTeacher",
    "open_clip": "distill.teachers.dual:OpenClipTeacher",
    "generative": "distill.teachers.generative:GenerativeTeacher",
    "server": "distill.teachers.server:load_server_teacher",
    "callable": "distill.teachers.callable:CallableTeacher",
    "table": "distill.teachers.table:TableTeacher",
    "ensemble": "distill.teachers.ensemble:EnsembleTeacher",
    "ema": "cvlm.training.ema:EmaTeacher",
    "peer": "cvlm.training.peers:PeerTeacher",
}

GIVES: dict[str, str] = {
    "blip": "white-box: answer scores, or match scores, embeddings; cross-attention of its text model",
    "bridgetower": "white-box: match scores or similarity; cross-attention both ways",
    "callable": "gray- or black-box: a function of yours, such as a simulator",
    "clip": "gray-box: similarity and embeddings",
    "cvlm": "white-box: everything; another model of ours",
    "ema": "white-box: the student's own moving average",
    "ensemble": "gray-box: the weighted mean of other teachers; attention of one of them",
    "flava": "white-box: attention and states of the joint sequence; answers with a head",
    "generative": "gray- or black-box: scores each answer, or writes one (Qwen-VL, LLaVA, SmolVLM, ...)",
    "git": "white-box: answer scores; attention to the picture",
    "open_clip": "gray-box: similarity and embeddings",
    "peer": "gray-box: students that train together",
    "server": "black-box: answers of an OpenAI-compatible server, or the largest log-probabilities",
    "siglip": "gray-box: similarity and embeddings",
    "table": "gray-box: precomputed targets, people's soft labels",
    "vilt": "white-box: answers; attention and states of the joint sequence",
}
"""Kind -> what it lets a student see, for people."""

KIND_OF = {"siglip2": "siglip"}
"""Types of transformers models that another kind of teacher serves."""


def load_teacher(kind_or_name: str | Path | Teacher, /, **settings: Any) -> Teacher:
    """Build a teacher of a kind in `TEACHERS`, load one by folder or hub name, or take a ready one as it is.

    Args:
        kind_or_name: a kind; a folder whose config.json tells the kind; `hf:` and a hub name, likewise; or an object
            that keeps the `Teacher` protocol (which needs no entry in the table).
        **settings: what the kind's factory takes, for instance `name="facebook/flava-full"` beside a kind.

    Raises:
        DistillError: if the kind is unknown, the settings do not fit its factory, its module is not installed, or an
            object lacks part of the protocol.
    """
    if not isinstance(kind_or_name, str | Path):
        return _ready(kind_or_name, settings)
    if str(kind_or_name) not in TEACHERS and (str(kind_or_name).startswith("hf:") or Path(kind_or_name).is_dir()):
        settings = {"name": str(kind_or_name).removeprefix("hf:"), **settings}
        kind_or_name = _model_type(settings["name"])
    factory = _factory(str(kind_or_name))
    try:
        inspect.signature(factory).bind(**settings)
    except TypeError as error:
        raise DistillError(
            f"teacher {kind_or_name!r} cannot take the settings {sorted(settings)}: {error}; "
            f"it takes {inspect.signature(factory)}"
        ) from error
    teacher: Teacher = factory(**settings)
    return teacher


def _model_type(name: str) -> str:
    """Read which kind of model a folder or a hub repository holds."""
    path = Path(name) / "config.json"
    if Path(name).is_dir():
        try:
            kind = str(json.loads(path.read_text(encoding="utf-8")).get("model_type"))
        except (OSError, ValueError, AttributeError) as error:
            raise DistillError(f"{name} holds no model: its config.json cannot be read ({error})") from error
    else:
        from distill.teachers.transformers_common import read_config

        kind = str(read_config(name)[1].model_type)
    kind = KIND_OF.get(kind, kind)
    if kind not in TEACHERS and _reads_and_writes(kind):
        return "generative"
    if kind not in TEACHERS:
        raise DistillError(f"{name} holds a model of type {kind!r}, which is no kind of teacher: {sorted(TEACHERS)}")
    return kind


def _reads_and_writes(model_type: str) -> bool:
    """Whether models of this type continue a picture and a text with text."""
    from transformers.models.auto.modeling_auto import MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES

    return model_type in MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES


def _ready(teacher: Any, settings: dict[str, Any]) -> Teacher:
    # The class is asked first: to ask the object would compute what a property gives.
    missing = [
        part for part in sorted(_protocol_members()) if not (hasattr(type(teacher), part) or hasattr(teacher, part))
    ]
    if missing:
        raise DistillError(
            f"{type(teacher).__name__} object is no teacher: it lacks {missing}; see distill.teachers.base.Teacher, "
            f"or give one of the kinds {sorted(TEACHERS)}"
        )
    if settings:
        raise DistillError(f"a ready teacher takes no settings, got {sorted(settings)}; set them when you build it")
    checked: Teacher = teacher
    return checked


def _protocol_members() -> set[str]:
    members = vars(Teacher).items()
    return {name for name, value in members if name[0] != "_" and isinstance(value, FunctionType | property)}


def _factory(kind: str) -> Callable[..., Any]:
    if kind not in TEACHERS:
        # A name with a slash is a model's, not a kind that was mistyped.
        near = [] if "/" in kind else difflib.get_close_matches(kind.lower(), TEACHERS, n=1, cutoff=0.5)
        guess = f"did you mean {near[0]!r}?" if near else f"give a kind, and the model as name={kind!r}."
        raise DistillError(f"no teacher of kind {kind!r}; {guess} Kinds are {sorted(TEACHERS)}")
    module, _, attribute = TEACHERS[kind].partition(":")
    try:
        factory: Callable[..., Any] = getattr(importlib.import_module(module), attribute)
    except ModuleNotFoundError as error:
        raise DistillError(
            f"teacher {kind!r} lives in {TEACHERS[kind]}, but {error.name!r} is not installed; install it and try again"
        ) from error
    return factory
