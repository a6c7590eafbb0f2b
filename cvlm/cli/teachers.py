"""The teachers of a recipe, made out of their specifications."""

from collections.abc import Callable, Collection
from dataclasses import fields
from typing import Any

from cvlm.api import load_teacher
from cvlm.config import (
    CallableTeacherSpec,
    CvlmTeacherSpec,
    EnsembleTeacherSpec,
    GenerativeTeacherSpec,
    MemberSpec,
    PeerTeacherSpec,
    Recipe,
    SavedTeacherSpec,
    ServerTeacherSpec,
    TableTeacherSpec,
)
from cvlm.errors import CvlmError
from cvlm.tasks import TASKS
from distill import Teacher
from distill.teachers.chat_client import Limits


def open_teacher(
    spec: MemberSpec | ServerTeacherSpec | EnsembleTeacherSpec,
    *,
    task: str,
    answers: tuple[str, ...],
    trained: Callable[[CvlmTeacherSpec], Teacher],
) -> Teacher:
    """Load a teacher that is there before the students train.

    Args:
        spec: which one.
        task: of the recipe.
        answers: the students' vocabulary.
        trained: gives the teacher that the recipe trains itself.

    Raises:
        CvlmError: there is no such model.
        DistillError: it cannot teach, or members of an ensemble do not go together.
    """
    if isinstance(spec, EnsembleTeacherSpec):
        members = [open_teacher(member, task=task, answers=answers, trained=trained) for member in spec.members]
        return load_teacher(kind="ensemble", members=members, weights=spec.weights, attention=spec.attention)
    if isinstance(spec, CvlmTeacherSpec):
        return trained(spec)
    if isinstance(spec, SavedTeacherSpec):
        return load_teacher(spec.path)
    settings: dict[str, Any]
    told: dict[str, Any] = {"answers": answers, "pictures": TASKS[task].pictures}
    if isinstance(spec, CallableTeacherSpec):
        return load_teacher(kind="callable", target=spec.target, gives=spec.gives, **told)
    if isinstance(spec, TableTeacherSpec):
        return load_teacher(kind="table", path=spec.path, skip=spec.skip, **told)
    if isinstance(spec, GenerativeTeacherSpec):
        settings = {key: getattr(spec, key) for key in ("mode", "prompt", "max_tokens")}
        return load_teacher(spec.name, kind="generative", answers=answers, **settings)
    if isinstance(spec, ServerTeacherSpec):
        limits = {limit.name: getattr(spec, limit.name) for limit in fields(Limits)}
        keys = ("url", "model", "cache", "key_variable", "prompt", "top_logprobs", "concurrency", "options")
        settings = {key: getattr(spec, key) for key in keys}
        return load_teacher(kind="server", answers=answers, limits=limits, **settings)
    # blip and git write their answers: they score those of the data.
    named = spec.head is not None or (spec.kind in ("blip", "git") and answers)
    settings = {"head": spec.head} if spec.head is not None else {}
    settings |= {"answers": answers} if named else {}
    return load_teacher(spec.name, kind=spec.kind, **settings)


def check_composition(recipe: Recipe, taught: Collection[str]) -> None:
    """Refuse a chain that nothing is handed on in, and peers that would begin from unlike places.

    Args:
        recipe: the experiment.
        taught: arms with an objective that reads a teacher.

    Raises:
        CvlmError: naming the phase.
    """
    if recipe.chain is not None and not recipe.chain_arms.keys() <= set(taught):
        raise CvlmError(
            f"chain.phase is {recipe.chain.phase!r}, and none of its objectives reads a teacher; add one, "
            "such as logits"
        )
    for arm in sorted(taught):
        start = recipe.start_of(arm)
        if isinstance(recipe.companion_of(arm), PeerTeacherSpec) and start is not None:
            raise CvlmError(
                f"phase {arm!r} starts from {start!r}, and its peers would begin untrained beside it; peers train "
                "together from the beginning: set start: fresh"
            )
