"""What a trained arm learned from: its own split, and everything that its start and its teacher were trained on."""

from collections.abc import Sequence
from pathlib import Path

from cvlm.config import (
    CvlmTeacherSpec,
    EnsembleTeacherSpec,
    Recipe,
    SavedTeacherSpec,
)
from cvlm.lineage import DataSource, TrainingRecord, inherit, read_record


def training_record(
    recipe: Recipe, run: Path, phase: str, *, seed: int, taught: bool, own: DataSource, beyond: Sequence[str] = ()
) -> TrainingRecord:
    """Describe what the model of one phase and seed was trained on.

    Args:
        recipe: of the run.
        run: the run folder; earlier phases stand in it with records of their own.
        phase: the phase that has just ended.
        seed: of it.
        taught: whether an objective of the phase read the teacher.
        own: the training split.
        beyond: what that leaves out.
    """
    learned_from = _learned_from(recipe, run, phase, seed, taught).items()
    records = [(name, read_record(folder) if folder is not None else None) for name, folder in learned_from]
    return inherit(own.model_copy(update={"used_by": (phase,)}), records, beyond)


def _learned_from(recipe: Recipe, run: Path, phase: str, seed: int, taught: bool) -> dict[str, Path | None]:
    """Models that a phase starts from or is taught by -> their folder, where they have one."""
    models: dict[str, Path | None] = {}
    if phase == "teacher":
        return models
    start, previous = recipe.start_of(phase), recipe.chain_arms.get(phase)
    if start is not None:
        models[start] = run / start / f"seed{seed}"
    if not taught and (start is not None or recipe.initialise_fusion != "teacher"):
        return models
    if previous is not None:
        models[previous] = run / previous / f"seed{seed}"
    elif recipe.companion_of(phase) is None:  # a companion saw what the student saw
        members = recipe.teacher.members if isinstance(recipe.teacher, EnsembleTeacherSpec) else (recipe.teacher,)
        models |= dict(_teacher(member, run) for member in members)
    return models


def _teacher(spec: object, run: Path) -> tuple[str, Path | None]:
    """Return what to call a teacher, and its folder."""
    if isinstance(spec, CvlmTeacherSpec):
        return "teacher", run / "teacher"
    if isinstance(spec, SavedTeacherSpec):
        return f"teacher {spec.path}", Path(spec.path)
    named = (str(getattr(spec, key)) for key in ("name", "target", "path", "model") if hasattr(spec, key))
    told = next(named, str(spec))
    return f"teacher {told}", None
