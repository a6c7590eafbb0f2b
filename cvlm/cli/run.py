"""`cvlm run`: every phase of a recipe, evaluation, statistics, cost, report. Interrupted runs go on where they were.

A run is a list of jobs, each with a mark on disk that is written last: stored tower outputs, the teacher, its targets,
and one job per student arm and seed. Running the same recipe into the same folder skips what is marked.
"""

import json
import logging
import os
import shutil
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
import yaml
from filelock import FileLock

from benchmarks.captions import check_installed, shown_captions
from benchmarks.compare import compared_arms, metrics_json
from benchmarks.contamination import shared_between
from benchmarks.environment import environment
from benchmarks.tasks import Scores, majority, score
from cvlm.api import check_teacher, load_teacher
from cvlm.cli.console import Console
from cvlm.cli.lineage import training_record
from cvlm.cli.teachers import check_composition, open_teacher
from cvlm.config import CvlmTeacherSpec, EmaTeacherSpec, PeerTeacherSpec, Recipe, StudentSpec, TeacherSpec
from cvlm.cost import Ledger, PhaseCost, PhaseMeter
from cvlm.data import Examples, Splits, StoredTokens, load_data
from cvlm.data.training_record import TRAINING_DATA, DataSource, source_of, write_record
from cvlm.errors import CvlmError, unknown_name
from cvlm.files import write_atomic
from cvlm.model import CVLM, compose, load_model, save_model
from cvlm.report import write_report
from cvlm.tasks import TASKS
from cvlm.training import (
    EmaTeacher,
    Imitation,
    LiveTarget,
    ModelInputs,
    PeersTarget,
    PeerTeacher,
    PhaseJob,
    TargetSource,
    clear_checkpoints,
    collect_answers,
    initialise_from_teacher,
    merged_requests,
    model_inputs,
    pick_device,
    predict,
    store_targets,
    target_name,
    teacher_inputs,
    train_phase,
)
from distill import Objective, Request, Teacher, build_objective
from distill.imitation import check_teacher_answers
from distill.targets import storable

logger = logging.getLogger(__name__)

TEACHER_SEED = 1000
"""The teacher is trained once, with a seed of its own, so that no student shares its data order."""

PEER_SEED = 2000
"""Of the first peer, above the student's; every further one adds as much again."""

RANK = int(os.environ.get("RANK", "0"))
"""Of this process under torchrun; every process trains, the first one writes."""


@dataclass
class Run:
    """One run of a recipe in a folder.

    Attributes:
        recipe: the experiment.
        out: the run folder.
        console: progress and tables.
    """

    recipe: Recipe
    out: Path
    console: Console
    scores: dict[str, list[Scores]] = field(default_factory=dict)

    def execute(self) -> dict[str, Any]:
        """Run every job that is not done, write every result, and return metrics.json."""
        if int(os.environ.get("WORLD_SIZE", "1")) > 1:
            raise CvlmError("cvlm run is one process; under torchrun, use cvlm train for one phase after the other")
        self._check()
        self._open_folder()
        if "teacher" in self.recipe.phases:
            self._train_teacher()
        for seed in self.recipe.seeds:
            for arm in self.recipe.student_arms:
                self._train_arm(arm, seed)
        return self._report()

    def execute_phase(self, phase: str, seed: int) -> Path:
        """Run one phase, on what earlier phases left in the folder; returns the model's folder."""
        known = dict.fromkeys([*self.recipe.phases, *self.recipe.student_arms])
        if phase not in known:
            raise unknown_name("phase", phase, known)
        if phase != "teacher" and seed not in self.recipe.seeds:
            raise CvlmError(f"seed {seed} is none of the recipe's seeds {list(self.recipe.seeds)}")
        self._check()
        self._open_folder()
        if phase == "teacher":
            self._train_teacher()
            return self.out / "teacher"
        start = self.recipe.start_of(phase)
        earlier = [] if start is None else [self.out / start / f"seed{seed}"]
        if phase in self.recipe.chain_arms:
            earlier.append(self.out / self.recipe.chain_arms[phase] / f"seed{seed}")
        elif "teacher" in self.recipe.phases and (
            (self._taught(phase) and self.recipe.companion_of(phase) is None) or self._imitates(phase)
        ):
            earlier.append(self.out / "teacher")
        for folder in earlier:
            if not (folder / "config.json").exists():
                raise CvlmError(f"phase {phase!r} needs the model {folder}, which is missing; run its phase first")
        self._train_arm(phase, seed)
        return self.out / phase / f"seed{seed}"

    def store_teacher(self) -> list[str]:
        """Train the teacher where the recipe does, and store all that it is asked; no student is trained.

        Returns:
            One line about each thing that is stored, or why it cannot be.
        """
        arms = self.recipe.teacher_arms
        taught, imitating = any(map(self._taught, arms)), any(map(self._imitates, arms))
        if not taught and not imitating:
            raise CvlmError("no phase of the recipe reads a teacher, so there is nothing to store")
        if isinstance(self.recipe.teacher, EmaTeacherSpec | PeerTeacherSpec):
            raise CvlmError(f"a teacher of kind {self.recipe.teacher.kind} comes about as the student trains")
        self._check()
        self._open_folder()
        if "teacher" in self.recipe.phases:
            self._train_teacher()
        lines = []
        if taught:
            stored = not isinstance(self.target, LiveTarget)
            said = f"targets of {len(self.data.train)} pairs in {self.out / 'targets'}"
            lines.append(said if stored else "no targets: the objectives need the teacher beside the student")
        if imitating:
            counts = self.imitation.provenance["counts"]
            said = f"answers to {counts['asked']} questions in {self.out / 'imitation'}, {counts['kept']} kept"
            lines.append(said)
        return lines

    # --- before anything is trained -----------------------------------------------------------------------------

    def _open_folder(self) -> None:
        """Make the folder, or recognise it as an interrupted run of the same recipe."""
        resolved = yaml.safe_dump(json.loads(self.recipe.model_dump_json()), sort_keys=False)
        path = self.out / "recipe.yaml"
        try:
            if path.exists() and path.read_text(encoding="utf-8") != resolved:
                raise CvlmError(f"{self.out} holds a run of another recipe; choose another --out, or delete the folder")
            self.out.mkdir(parents=True, exist_ok=True)
            path.write_text(resolved, encoding="utf-8")
            if not (self.out / "environment.json").exists():  # a resumed run keeps the date and place of its beginning
                text = json.dumps(environment(self.device), indent=2)
                (self.out / "environment.json").write_text(text, encoding="utf-8")
        except OSError as error:
            raise CvlmError(f"cannot write to the run folder {self.out}: {error.strerror}") from error

    def _check(self) -> None:
        """Build every part of the experiment once, so that what cannot work fails before the first step."""
        if self.recipe.task == "captioning":
            check_installed()
        student = self._new_student(self.recipe.seeds[0])
        arms, chain = self.recipe.student_arms, self.recipe.chain_arms
        taught = {arm for arm in arms if self._taught(arm)}
        imitating = {arm for arm in arms if self._imitates(arm)}
        asking = ((taught & {*self.recipe.teacher_arms}) | imitating) - chain.keys()
        teacher = self._teacher_preview(self.recipe.teacher) if asking else None
        last = load_teacher(self._new_student(self.recipe.seeds[0])) if chain else None
        for arm in arms:
            companion = self.recipe.phase_of(arm).companion
            own = last if arm in chain else teacher if companion is None else self._teacher_preview(companion)
            check_teacher(student, own if arm in taught else None, self._objectives(arm))
        check_composition(self.recipe, taught)
        if teacher is not None and taught & {*self.recipe.teacher_arms}:
            # A table may lack pairs; that is said now, not when the first phase is trained.
            _ = LiveTarget(teacher=teacher, examples=self.data.train).missing
        if imitating:
            assert teacher is not None, "the recipe was checked to have one"
            check_teacher(student, teacher, [])
            asked = self.recipe.imitation.model_dump(include={"samples", "temperature", "confidence"})
            check_teacher_answers(teacher, **asked)
        for split in (self.data.train, self.data.test):
            self._check_pictures(split)

    def _check_pictures(self, split: Examples) -> None:
        """Decode the user's own pictures once before the first step; packages and imports were checked before."""
        pictures = split.pictures if self.recipe.data.kind == "jsonl" else split.pictures[:1]
        bar, broken = self.console.bar(f"checking pictures, {split.split} split"), []
        for done, picture in enumerate(pictures, start=1):
            try:
                picture.load()
            except CvlmError as error:
                broken.append(str(error))
            if len(pictures) > 1:
                bar(done, len(pictures))
        if broken:
            more = f"\n  ... and {len(broken) - 5} more" if len(broken) > 5 else ""
            raise CvlmError("\n  ".join([f"{len(broken)} picture(s) cannot be read:", *broken[:5]]) + more)

    def _teacher_preview(self, spec: TeacherSpec | None) -> Teacher | None:
        """The teacher as far as requirements go: what will be trained here can be asked before it is."""
        seed = self.recipe.seeds[0]
        if isinstance(spec, EmaTeacherSpec):
            average = EmaTeacher(decay=spec.decay)
            average.follow(self._new_student(seed))
            return average
        if isinstance(spec, PeerTeacherSpec):
            return PeerTeacher(students=self._new_peers(spec, seed))
        if self.recipe.trained_teacher is None:
            return self.teacher if spec is not None else None
        return self._open_teacher(lambda own: load_teacher(self._compose(own.model, TEACHER_SEED)))

    # --- parts --------------------------------------------------------------------------------------------------

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

    @cached_property
    def teacher(self) -> Teacher:
        """The trained teacher."""
        return self._open_teacher(lambda _: load_teacher(self.out / "teacher")).to(self.device)

    def _open_teacher(self, trained: Callable[[CvlmTeacherSpec], Teacher]) -> Teacher:
        spec = self.recipe.teacher
        assert spec is not None, "only asked for where an objective reads a teacher"
        assert not isinstance(spec, EmaTeacherSpec | PeerTeacherSpec), "these are made for each student"
        return open_teacher(spec, task=self.recipe.task, answers=self.data.train.answers, trained=trained)

    @cached_property
    def target(self) -> TargetSource:
        """The signal of the recipe's teacher for the training pairs, for all arms and seeds that it teaches."""
        return self._target_of(self.teacher, self.recipe.teacher_arms, "train")

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
            self._book("targets", key, meter.cost)
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
                self._book("targets", f"towers {teacher.fingerprint[:8]}", meter.cost)
        return LiveTarget(teacher=teacher, examples=train, inputs=inputs, device=self.device)

    @property
    def target_name(self) -> str:
        """Folder below `targets` of what the recipe's teacher says to the recipe's objectives."""
        return target_name(self._live(self.teacher), self._teacher_request(self.teacher, self.recipe.teacher_arms))

    def _arm_target(self, arm: str, seed: int, inputs: ModelInputs) -> TargetSource | None:
        """Return the signal that teaches an arm: of the recipe's teacher, the last student, or companions."""
        spec, previous = self.recipe.companion_of(arm), self.recipe.chain_arms.get(arm)
        if not self._taught(arm):
            return None
        if previous is not None:
            teacher = load_teacher(self.out / previous / f"seed{seed}").to(self.device)
            return self._target_of(teacher, [arm], f"{arm} seed{seed}")
        if isinstance(spec, EmaTeacherSpec):
            own = inputs if self.data.stream is None else None  # a stream brings other pairs in every batch
            average = EmaTeacher(decay=spec.decay)
            return LiveTarget(teacher=average, examples=inputs.examples, inputs=own, device=self.device)
        if isinstance(spec, PeerTeacherSpec):
            peers = self._new_peers(spec, seed)
            return PeersTarget(students=peers, inputs=tuple(self._inputs(peer, inputs.examples) for peer in peers))
        return self.target

    def _new_peers(self, spec: PeerTeacherSpec, seed: int) -> tuple[CVLM, ...]:
        peer = spec.student if spec.student is not None else self.recipe.student
        return tuple(self._compose(peer, seed + PEER_SEED * i) for i in range(1, spec.number + 1))

    @cached_property
    def imitation(self) -> Imitation:
        """The teacher's answers to the training questions, and the training split with them as labels."""
        live = self._live(self.teacher)
        with self._alone("imitation"), PhaseMeter(device=self.device) as meter:
            bar = self.console.bar("teacher answers")
            found = collect_answers(live, self.recipe.imitation, self.out / "imitation", progress=bar)
            meter.add(flops=found.flops, samples=found.samples)
        if found.samples:
            self._book("targets", "answers", meter.cost)
        return found

    def _imitates(self, arm: str) -> bool:
        return self.recipe.phase_of(arm).labels == "teacher"

    def _taught(self, arm: str) -> bool:
        return any(term.teacher_needs for term in self._objectives(arm))

    def _teacher_request(self, teacher: Teacher, arms: Sequence[str]) -> Request:
        """Union of what arms ask of a teacher."""
        terms = [term for arm in arms for term in self._objectives(arm)]
        return merged_requests(terms, self.recipe.student.depth, teacher.depth)[1]

    def _longest_text(self, inputs: ModelInputs | None) -> int:
        if inputs is not None and isinstance(inputs.text, StoredTokens):
            return inputs.text.mask.shape[1]
        # A token stands for a character at least, and no encoder here reads more than 512.
        return min(512, max(len(text) for text in self.data.train.texts) + 2)

    def _compose(self, spec: StudentSpec, seed: int) -> CVLM:
        torch.manual_seed(seed)
        return compose(spec, task=self.recipe.task, answers=self.data.train.answers)

    def _new_student(self, seed: int) -> CVLM:
        return self._compose(self.recipe.student, seed)

    def _objectives(self, arm: str) -> list[Objective]:
        specs = self.recipe.phase_of(arm).objectives
        return [build_objective(spec.kind, weight=spec.weight, **spec.settings) for spec in specs]

    def _inputs(self, model: CVLM, examples: Examples) -> ModelInputs:
        """Stored tower outputs of a model over a split, booked under `encode` when they are made; none of a stream."""
        streamed = self.data.stream is not None and examples is not self.data.test
        store = None if streamed else self.out / "features"
        bar = self.console.bar(f"frozen towers, {examples.split} split")
        with self._alone("features"), PhaseMeter(device=self.device) as meter:
            inputs = model_inputs(model, examples, store, device=self.device, progress=bar, meter=meter)
        if meter.cost.samples:
            self._book("encode", f"{(model.spec.vision or model.spec.text).name} {examples.split}", meter.cost)
        return inputs

    # --- jobs ---------------------------------------------------------------------------------------------------

    def _train_teacher(self) -> None:
        folder = self.out / "teacher"
        spec = self.recipe.trained_teacher
        assert spec is not None
        if not (folder / "scores.npz").exists():
            model = self._compose(spec.model, TEACHER_SEED)
            job = self._job(model, "teacher", TEACHER_SEED, self._inputs(model, self.data.train), None)
            self._train_and_score(job, "teacher", "teacher", folder)
        if RANK == 0:
            self.scores["teacher"] = [Scores.load(folder / "scores.npz")]

    def _train_arm(self, arm: str, seed: int) -> None:
        folder = self.out / arm / f"seed{seed}"
        if not (folder / "scores.npz").exists():
            start = self.recipe.start_of(arm)
            model = self._new_student(seed) if start is None else load_model(self.out / start / f"seed{seed}")
            if start is None and self.recipe.initialise_fusion == "teacher":
                initialise_from_teacher(model, self.teacher)
            shown = self.data.train.hide_labels(self.recipe.data.labelled, seed)
            inputs = self._inputs(model, self.imitation.examples if self._imitates(arm) else shown)
            job = self._job(model, arm, seed, inputs, self._arm_target(arm, seed, inputs))
            self._train_and_score(job, arm, f"seed{seed}", folder)
        if RANK > 0:
            return
        if seed == self.recipe.seeds[0]:
            self._copy_model(folder, self.out / arm)
        self.scores.setdefault(arm, []).append(Scores.load(folder / "scores.npz"))

    def _job(self, model: CVLM, arm: str, seed: int, inputs: ModelInputs, target: TargetSource | None) -> PhaseJob:
        folder = self.out / arm if arm == "teacher" else self.out / arm / f"seed{seed}"
        return PhaseJob(
            student=model,
            phase=self.recipe.phase_of(arm),
            objectives=self._objectives(arm),
            inputs=inputs,
            target=target,
            stream=self.data.stream,
            engine=self.recipe.engine,
            seed=seed,
            folder=folder,
            report=self.console.steps(f"{arm}, seed {seed}" if arm != "teacher" else "teacher"),
        )

    def _train_and_score(self, job: PhaseJob, phase: str, key: str, folder: Path) -> None:
        cost, log = train_phase(job)
        if RANK > 0:
            return  # one process writes
        save_model(job.student, folder)
        taught = job.target is not None or job.phase.labels == "teacher"
        record = training_record(self.recipe, self.out, phase, seed=job.seed, taught=taught, own=self._train_source)
        if job.stream is not None:
            first = job.inputs.examples
            beyond = f"{first.name}: streamed, not recorded beyond its first {len(first)} pairs"
            record = record.model_copy(update={"unknown": (*record.unknown, beyond)})
        write_record(folder, record)
        (folder / "log.json").write_text(json.dumps(log, sort_keys=True), encoding="utf-8")  # as checkpoints keep it
        self._book(phase, key, cost)
        clear_checkpoints(folder)
        test = self._inputs(job.student, self.data.test)
        with PhaseMeter(device=self.device) as meter:
            prediction = predict(job.student, test, device=self.device)
            meter.add(flops=prediction.flops, samples=len(self.data.test))
        self._book("evaluate", f"{phase} {key}", meter.cost)
        if prediction.captions is not None:
            shown = shown_captions(self.data.test, prediction.captions)
            write_atomic(folder / "captions.json", json.dumps(shown, indent=1, ensure_ascii=False).encode())
        score(self.recipe.task, self.data.test, prediction).save(folder / "scores.npz")

    @cached_property
    def _train_source(self) -> DataSource:
        """The training split, for the record of what a model was trained on."""
        return source_of(self.data.train, self.console.bar("hashing training pictures"))

    def _alone(self, name: str) -> FileLock:
        """Let one process of several fill a store; the others then find it full."""
        return FileLock(self.out / f".{name}.lock")

    def _book(self, phase: str, key: str, cost: PhaseCost) -> None:
        self.ledger.add(phase, key, cost)

    def _copy_model(self, source: Path, target: Path) -> None:
        """Make the arm's own folder loadable: it holds the first seed's model."""
        for name in ("model.safetensors", "answers.json", "README.md", TRAINING_DATA, "config.json"):
            shutil.copyfile(source / name, target / name)

    # --- results ------------------------------------------------------------------------------------------------

    def _report(self) -> dict[str, Any]:
        arms: dict[str, list[Scores]] = {}
        if TASKS[self.recipe.task].output != "similarity" and self.data.stream is None:
            arms["majority"] = [majority(self.data.train, self.data.test)]
        arms |= self.scores
        metrics = metrics_json(self.recipe.task, self.data.test.split, arms, compared_arms(list(arms)))
        metrics["contamination"] = shared_between(self.data.train, self.data.test).as_json()
        if self.data.stream is not None:
            metrics["contamination"]["first_training_pairs_only"] = len(self.data.train)
        metrics["skipped"] = {"train": self._skipped_training(), "test": list(self.data.test.skipped)}
        write_atomic(self.out / "metrics.json", json.dumps(metrics, indent=2).encode())
        write_report(self.out)
        return metrics

    def _skipped_training(self) -> list[str]:
        """Return the training samples that were broken and left out: found at loading, or in a stream on the way."""
        lines = [line for file in self.out.glob("**/skipped-*.jsonl") for line in file.read_text().splitlines()]
        return [*self.data.train.skipped, *sorted({json.loads(line) for line in lines})]
