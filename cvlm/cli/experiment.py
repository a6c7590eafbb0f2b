"""What the jobs of a recipe are made of: data, models, what teaches them, and the stores and ledger that they share.

Everything is made when it is first asked for, and once: two arms that read the same teacher open it once.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import torch
from filelock import FileLock

from cvlm.api import load_teacher
from cvlm.cli.console import Console
from cvlm.cli.teachers import open_teacher
from cvlm.config import CvlmTeacherSpec, EmaTeacherSpec, PeerTeacherSpec, Recipe, StudentSpec
from cvlm.cost import Ledger, PhaseMeter
from cvlm.data import Examples, Splits, StoredTokens, load_data
from cvlm.model import CVLM, compose
from cvlm.tasks import TASKS
from cvlm.training import (
    EmaTeacher,
    Imitation,
    LiveTarget,
    ModelInputs,
    PeersTarget,
    TargetSource,
    collect_answers,
    merged_requests,
    model_inputs,
    pick_device,
    store_targets,
    target_name,
    teacher_inputs,
)
from distill import Objective, Request, Teacher, build_objective
from distill.targets import storable

TEACHER_SEED = 1000
"""The teacher is trained once, with a seed of its own, so that no student shares its data order."""

PEER_SEED = 2000
"""Of the first peer, above the student's; every further one adds as much again."""


@dataclass(frozen=True, kw_only=True)
class Experiment:
    """The parts of a recipe's jobs, as they stand in one run folder.

    Attributes:
        recipe: the experiment.
        out: the run folder.
        console: progress and tables.
    """

    recipe: Recipe
    out: Path
    console: Console

    @cached_property
    def device(self) -> str:
        """Where models run."""
        return pick_device(self.recipe.engine)

    @cached_property
    def ledger(self) -> Ledger:
        """cost.json."""
        return Ledger(self.out / "cost.json")

    @cached_property
    def data(self) -> Splits:
        """Both splits, with every label."""
        return load_data(self.recipe.data, self.recipe.task)

    def folder(self, phase: str, seed: int) -> Path:
        """Return where the model of a phase and seed is saved; the teacher is trained once."""
        return self.out / "teacher" if phase == "teacher" else self.out / phase / f"seed{seed}"

    # --- phases -------------------------------------------------------------------------------------------------

    def objectives(self, phase: str) -> list[Objective]:
        """Build the terms of a phase's loss."""
        specs = self.recipe.phase_of(phase).objectives
        return [build_objective(spec.kind, weight=spec.weight, **spec.settings) for spec in specs]

    def taught(self, phase: str) -> bool:
        """Whether an objective of the phase reads a teacher."""
        return any(term.teacher_needs for term in self.objectives(phase))

    def imitates(self, phase: str) -> bool:
        """Whether the phase is trained on the teacher's answers."""
        return self.recipe.phase_of(phase).labels == "teacher"

    # --- models -------------------------------------------------------------------------------------------------

    def new_model(self, spec: StudentSpec, seed: int) -> CVLM:
        """Compose a model; the seed draws the weights that no encoder brings."""
        torch.manual_seed(seed)
        return compose(spec, task=self.recipe.task, answers=self.data.train.answers)

    def new_student(self, seed: int) -> CVLM:
        """Compose the recipe's student."""
        return self.new_model(self.recipe.student, seed)

    def new_peers(self, spec: PeerTeacherSpec, seed: int) -> tuple[CVLM, ...]:
        """Compose the models that train beside the student of a seed."""
        peer = spec.student if spec.student is not None else self.recipe.student
        return tuple(self.new_model(peer, seed + PEER_SEED * i) for i in range(1, spec.number + 1))

    def inputs(self, model: CVLM, examples: Examples) -> ModelInputs:
        """Stored tower outputs of a model over a split, booked under `encode` when they are made; none of a stream."""
        streamed = self.data.stream is not None and examples is not self.data.test
        store = None if streamed else self.out / "features"
        bar = self.console.bar(f"frozen towers, {examples.split} split")
        with self._alone("features"), PhaseMeter(device=self.device) as meter:
            inputs = model_inputs(model, examples, store, device=self.device, progress=bar, meter=meter)
        if meter.cost.samples:
            self.ledger.add("encode", f"{(model.spec.vision or model.spec.text).name} {examples.split}", meter.cost)
        return inputs

    # --- teachers -----------------------------------------------------------------------------------------------

    @cached_property
    def teacher(self) -> Teacher:
        """The recipe's teacher, trained."""
        return self.teacher_with(lambda _: load_teacher(self.out / "teacher")).to(self.device)

    def teacher_with(self, trained: Callable[[CvlmTeacherSpec], Teacher]) -> Teacher:
        """Open the recipe's teacher, given where the one that the recipe trains itself comes from."""
        spec = self.recipe.teacher
        assert spec is not None, "only asked for where an objective reads a teacher"
        assert not isinstance(spec, EmaTeacherSpec | PeerTeacherSpec), "these are made for each student"
        return open_teacher(spec, task=self.recipe.task, answers=self.data.train.answers, trained=trained)

    @cached_property
    def target(self) -> TargetSource:
        """The signal of the recipe's teacher for the training pairs, for all arms and seeds that it teaches."""
        return self._target_of(self.teacher, self.recipe.teacher_arms, "train")

    @property
    def target_name(self) -> str:
        """Folder below `targets` of what the recipe's teacher says to the recipe's objectives."""
        return target_name(self._live(self.teacher), self._teacher_request(self.teacher, self.recipe.teacher_arms))

    def arm_target(self, arm: str, seed: int, inputs: ModelInputs) -> TargetSource | None:
        """Return the signal that teaches an arm: of the recipe's teacher, the last student, or companions."""
        spec, previous = self.recipe.companion_of(arm), self.recipe.chain_arms.get(arm)
        if not self.taught(arm):
            return None
        if previous is not None:
            teacher = load_teacher(self.folder(previous, seed)).to(self.device)
            return self._target_of(teacher, [arm], f"{arm} seed{seed}")
        if isinstance(spec, EmaTeacherSpec):
            own = inputs if self.data.stream is None else None  # a stream brings other pairs in every batch
            average = EmaTeacher(decay=spec.decay)
            return LiveTarget(teacher=average, examples=inputs.examples, inputs=own, device=self.device)
        if isinstance(spec, PeerTeacherSpec):
            peers = self.new_peers(spec, seed)
            return PeersTarget(students=peers, inputs=tuple(self.inputs(peer, inputs.examples) for peer in peers))
        return self.target

    @cached_property
    def imitation(self) -> Imitation:
        """The teacher's answers to the training questions, and the training split with them as labels."""
        live = self._live(self.teacher)
        with self._alone("imitation"), PhaseMeter(device=self.device) as meter:
            bar = self.console.bar("teacher answers")
            found = collect_answers(live, self.recipe.imitation, self.out / "imitation", progress=bar)
            meter.add(flops=found.flops, samples=found.samples)
        if found.samples:
            self.ledger.add("targets", "answers", meter.cost)
        return found

    def _target_of(self, teacher: Teacher, arms: Sequence[str], key: str) -> TargetSource:
        """Return a teacher's signal for the training pairs: stored where every objective of the arms allows it."""
        live, request = self._live(teacher), self._teacher_request(teacher, arms)
        whole = TASKS[self.recipe.task].pictures == 1 and self.recipe.task != "captioning"
        if self.data.stream is not None or not whole or not storable(request):
            return live
        length = self._longest_text(live.inputs)
        with self._alone("targets"), PhaseMeter(device=self.device) as meter:
            progress = self.console.bar("teacher targets")
            built = store_targets(live, request, self.out / "targets", text_length=length, progress=progress)
            meter.add(flops=built.flops, samples=built.samples)
        if built.samples:
            self.ledger.add("targets", key, meter.cost)
        return built.source

    def _live(self, teacher: Teacher) -> LiveTarget:
        """The teacher beside the training pairs; the outputs of its towers are stored where it has any."""
        train, inputs = self.data.train, None
        if self.data.stream is None:
            bar = self.console.bar("teacher towers")
            with PhaseMeter(device=self.device) as meter:
                store = self.out / "features"
                inputs = teacher_inputs(teacher, train, store, device=self.device, progress=bar, meter=meter)
            if meter.cost.samples:  # its towers were trained, so nobody has run them as they are now
                self.ledger.add("targets", f"towers {teacher.fingerprint[:8]}", meter.cost)
        return LiveTarget(teacher=teacher, examples=train, inputs=inputs, device=self.device)

    def _teacher_request(self, teacher: Teacher, arms: Sequence[str]) -> Request:
        """Union of what arms ask of a teacher."""
        terms = [term for arm in arms for term in self.objectives(arm)]
        return merged_requests(terms, self.recipe.student.depth, teacher.depth)[1]

    def _longest_text(self, inputs: ModelInputs | None) -> int:
        if inputs is not None and isinstance(inputs.text, StoredTokens):
            return inputs.text.mask.shape[1]
        # A token stands for a character at least, and no encoder here reads more than 512.
        return min(512, max(len(text) for text in self.data.train.texts) + 2)

    def _alone(self, name: str) -> FileLock:
        """Let one process of several fill a store; the others then find it full."""
        return FileLock(self.out / f".{name}.lock")
