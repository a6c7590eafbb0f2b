"""One experiment as a whole, and which of its parts go together."""

import re
from typing import Literal

from pydantic import Field, NonNegativeInt, model_validator

from cvlm.config.data import DataSpec
from cvlm.config.models import Strict, StudentSpec
from cvlm.config.phases import ChainSpec, EngineSpec, ImitationSpec, PhaseSpec
from cvlm.config.teachers import (
    CvlmTeacherSpec,
    EmaTeacherSpec,
    EnsembleTeacherSpec,
    PeerTeacherSpec,
    TableTeacherSpec,
    TeacherSpec,
)
from cvlm.tasks import TASKS

Task = Literal["vqa", "retrieval", "nlvr2", "snli_ve", "itm", "text", "captioning"]
RESERVED_PHASES: dict[str, str] = {
    "majority": "the baseline",
    "encode": "the cost of the frozen towers",
    "evaluate": "the cost of scoring",
    "features": "a folder of stored outputs",
    "targets": "a folder of stored targets",
    "imitation": "a folder of collected answers",
    "fresh": "a new student, where a phase says what to start from",
}


class Recipe(Strict):
    """One experiment: task, data, student, teacher, phases, seeds.

    `phases` holds `teacher` (fine-tune the teacher), `finetune` (phase 1) and any number of further student phases,
    each an arm of the report; those start from `finetune` unless they say otherwise.
    `initialise_fusion: teacher` begins fresh students with the teacher's multimodal weights where shapes match.
    """

    task: Task
    data: DataSpec
    student: StudentSpec
    teacher: TeacherSpec | None = None
    phases: dict[str, PhaseSpec]
    chain: ChainSpec | None = None
    imitation: ImitationSpec = ImitationSpec()
    initialise_fusion: Literal["random", "teacher"] = "random"
    seeds: tuple[NonNegativeInt, ...] = Field(default=(0, 1, 2), min_length=1)
    engine: EngineSpec = EngineSpec()

    @property
    def student_arms(self) -> tuple[str, ...]:
        """Phases that train the student, in the order of the file, and the rounds of the chain behind them."""
        return (*(name for name in self.phases if name != "teacher"), *self.chain_arms)

    @property
    def chain_arms(self) -> dict[str, str]:
        """Arm of each round of the chain -> the arm whose model is its teacher."""
        if self.chain is None:
            return {}
        arms = [self.chain.phase, *(f"{self.chain.phase}_chain{i}" for i in range(1, self.chain.rounds + 1))]
        return dict(zip(arms[1:], arms, strict=False))

    @property
    def trained_teacher(self) -> CvlmTeacherSpec | None:
        """What the phase `teacher` trains: the teacher of kind cvlm, or the member of that kind of an ensemble."""
        members = self.teacher.members if isinstance(self.teacher, EnsembleTeacherSpec) else (self.teacher,)
        return next((member for member in members if isinstance(member, CvlmTeacherSpec)), None)

    def companion_of(self, arm: str) -> EmaTeacherSpec | PeerTeacherSpec | None:
        """Return what trains along with an arm's student and teaches it; None where a ready teacher does."""
        spec = self.phase_of(arm).companion or self.teacher
        return spec if isinstance(spec, EmaTeacherSpec | PeerTeacherSpec) and arm not in self.chain_arms else None

    @property
    def teacher_arms(self) -> tuple[str, ...]:
        """Student arms that ask the recipe's own teacher, if they ask any."""
        arms = (arm for arm in self.student_arms if arm not in self.chain_arms)
        return tuple(arm for arm in arms if self.phase_of(arm).companion is None)

    def phase_of(self, arm: str) -> PhaseSpec:
        """Return how an arm is trained; rounds of a chain as the phase that they repeat."""
        return self.phases[arm if self.chain is None or arm in self.phases else self.chain.phase]

    def start_of(self, arm: str) -> str | None:
        """Return the phase that an arm starts from, None for a fresh student."""
        start = self.phase_of(arm).start
        if start is not None or arm == "finetune":
            return None if start == "fresh" else start
        return "finetune" if "finetune" in self.phases else None

    @model_validator(mode="after")
    def _phases_fit(self) -> "Recipe":
        problems = []
        if not self.student_arms:
            problems.append("phases holds no student phase; add finetune")
        seen: list[str] = []
        for name, phase in self.phases.items():
            if not re.fullmatch(r"[a-z][a-z0-9_]*", name):
                problems.append(f"phase name {name!r} must be lower-case letters, digits and _")
            if name in RESERVED_PHASES:
                problems.append(f"{name!r} names {RESERVED_PHASES[name]}; call the phase something else")
            start = phase.start if name == "teacher" else self.start_of(name)
            if start is not None and (name == "teacher" or start not in seen):
                known = ", ".join(seen) if seen and name != "teacher" else "none"
                problems.append(f"phase {name!r} starts from {start!r}, which is no earlier student phase ({known})")
            if name != "teacher":
                seen.append(name)
        if "teacher" in self.phases and self.trained_teacher is None:
            problems.append("phase 'teacher' trains a teacher of kind cvlm, and the recipe has none")
        if self.trained_teacher is not None and "teacher" not in self.phases:
            problems.append("a teacher of kind cvlm needs a phase 'teacher'; for a trained one use kind: saved")
        problems += _text_problems(self)
        problems += _composition_problems(self)
        problems += _imitation_problems(self)
        unread = [name for name, phase in self.phases.items() if phase.pairs == "all" and name != "teacher"]
        if self.task == "captioning" and self.data.labelled < 1 and unread:
            problems.append(
                f"{', '.join(unread)}: pairs: all would read captions that data.labelled hides; captioners read "
                "the caption of every pair; use pairs: labelled"
            )
        if len(set(self.seeds)) != len(self.seeds):
            problems.append(f"seeds {list(self.seeds)} repeat")
        if problems:
            raise ValueError("; ".join(problems))
        return self


def _text_problems(recipe: Recipe) -> list[str]:
    """Say which model has a vision encoder too many or too few for the task."""
    trained, shown = recipe.trained_teacher, TASKS[recipe.task].pictures
    models = {"student": recipe.student, "teacher": trained.model if trained is not None else None}
    wrong = [name for name, spec in models.items() if spec is not None and (spec.vision is None) == (shown > 0)]
    needed = "a vision encoder" if shown else "no picture, so write vision: null"
    problems = [f"{name}.vision: task {recipe.task!r} needs {needed}" for name in wrong]
    if not shown and recipe.initialise_fusion == "teacher":
        problems.append(f"task {recipe.task!r} has no fusion module to begin with; use initialise_fusion: random")
    return problems


def _imitation_problems(recipe: Recipe) -> list[str]:
    """Say why a phase cannot train on the teacher's answers."""
    arms = [name for name, phase in recipe.phases.items() if phase.labels == "teacher"]
    if not arms:
        return []
    problems, kind = [], getattr(recipe.teacher, "kind", None)
    named = f"phase(s) {', '.join(arms)}: labels: teacher"
    if "teacher" in arms:
        problems.append("phase 'teacher' cannot learn from the teacher's answers; it takes labels: task")
    if kind in (None, "ema", "peer"):
        problems.append(f"{named} needs a teacher that can be asked before the student trains")
    if recipe.chain is not None and recipe.chain.phase in arms:
        problems.append(f"{named} takes the recipe's teacher, so a chain of it would repeat the same; chain another")
    if recipe.data.kind == "stream":
        problems.append(f"{named} needs data whose pairs are known beforehand, not kind: stream")
    if TASKS[recipe.task].output != "answers":
        problems.append(f"{named} is for tasks with an answer vocabulary, not {recipe.task}")
    return problems


def _composition_problems(recipe: Recipe) -> list[str]:
    """Say what of the chain, or of a teacher that is not simply another model, does not fit the recipe."""
    problems = []
    teacher, kind = recipe.teacher, getattr(recipe.teacher, "kind", None)
    members = teacher.members if isinstance(teacher, EnsembleTeacherSpec) else (teacher,)
    companions = {phase.companion.kind for phase in recipe.phases.values() if phase.companion is not None}
    if "teacher" in recipe.phases and recipe.phases["teacher"].companion is not None:
        problems.append("phase 'teacher' trains the teacher itself; it takes no companion")
    tables = any(isinstance(member, TableTeacherSpec) for member in members)
    if recipe.data.kind == "stream" and ("peer" in (kind, *companions) or tables):
        named = "table" if tables else "peer"
        problems.append(f"a teacher of kind {named} needs data whose pairs are known beforehand, not kind: stream")
    if recipe.initialise_fusion == "teacher" and kind in ("callable", "table", "ensemble", "ema", "peer"):
        problems.append(f"a teacher of kind {kind} has no fusion module to begin with; use initialise_fusion: random")
    if recipe.chain is None:
        return problems
    phase = recipe.chain.phase
    students = [name for name in recipe.phases if name != "teacher"]
    if phase not in students:
        problems.append(f"chain.phase is {phase!r}, which is no student phase ({', '.join(students)})")
    taken = [arm for arm in recipe.chain_arms if arm in recipe.phases]
    if taken:
        problems.append(f"the chain makes the arm(s) {', '.join(taken)}, and phases of that name exist; rename them")
    if kind in ("ema", "peer") or (phase in students and recipe.phases[phase].companion is not None):
        problems.append("a chain repeats a phase with another teacher, and this phase has a companion of its own")
    return problems
