"""Teachers by name. The table holds strings, so importing it costs nothing; a teacher's module loads when asked for."""

import difflib
import importlib
import inspect
from collections.abc import Callable
from types import FunctionType
from typing import Any

from distill.errors import DistillError
from distill.teachers.base import Teacher

TEACHERS: dict[str, str] = {
    "cvlm": "cvlm.training.teacher:load_cvlm_teacher",
    "flava": "distill.teachers.flava:FlavaTeacher",
    "vilt": "distill.teachers.vilt:ViltTeacher",
}


def load_teacher(kind_or_name: str | Teacher, /, **settings: Any) -> Teacher:
    """Build a teacher of a kind in `TEACHERS`, or take a ready one as it is.

    Args:
        kind_or_name: a kind, or an object that keeps the `Teacher` protocol (which needs no entry in the table).
        **settings: what the kind's factory takes, for instance `name="facebook/flava-full"`.

    Raises:
        DistillError: if the kind is unknown, the settings do not fit its factory, its module is not installed, or an
            object lacks part of the protocol.
    """
    if not isinstance(kind_or_name, str):
        return _ready(kind_or_name, settings)
    factory = _factory(kind_or_name)
    try:
        inspect.signature(factory).bind(**settings)
    except TypeError as error:
        raise DistillError(
            f"teacher {kind_or_name!r} cannot take the settings {sorted(settings)}: {error}; "
            f"it takes {inspect.signature(factory)}"
        ) from error
    teacher: Teacher = factory(**settings)
    return teacher


def _ready(teacher: Any, settings: dict[str, Any]) -> Teacher:
    missing = [part for part in sorted(_protocol_members()) if not hasattr(teacher, part)]
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
        near = difflib.get_close_matches(kind.lower(), TEACHERS, n=1, cutoff=0.5)
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
