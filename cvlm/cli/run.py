"""`cvlm run`: every phase of a recipe, evaluation, statistics, cost, report. Interrupted runs go on where they were.

A run is a list of jobs, each with a mark on disk that is written last: stored tower outputs, the teacher, its targets,
and one job per student arm and seed. Running the same recipe into the same folder skips what is marked.
"""

import json
import logging
import os
import platform
import shutil
from dataclasses import dataclass, field
from datetime import UTC, datetime
from functools import cached_property
from importlib.metadata import version
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
import yaml
from filelock import FileLock

from benchmarks.compare import compared_arms, metrics_json
from benchmarks.tasks import Scores, majority, score
from cvlm.api import check_teacher, load_teacher
from cvlm.cli.console import Console
from cvlm.config import CvlmTeacherSpec, Recipe, SavedTeacherSpec, StudentSpec, TransformersTeacherSpec
from cvlm.cost import Ledger, PhaseCost, PhaseMeter, machine_info
from cvlm.data import Examples, Splits, load_data
from cvlm.errors import CvlmError, unknown_name
from cvlm.files import write_atomic
from cvlm.model import CVLM, compose, load_model, save_model
from cvlm.report import write_report
from cvlm.tasks import TASKS
from cvlm.training import (
    LiveTarget,
    ModelInputs,
    PhaseJob,
    TargetSource,
    clear_checkpoints,
    initialise_from_teacher,
    merged_requests,
    model_inputs,
    pick_device,
    predict,
    store_targets,
    teacher_inputs,
    train_phase,
)
from distill import Objective, Request, Teacher, build_objective
from distill.targets import STORABLE

logger = logging.getLogger(__name__)

TEACHER_SEED = 1000
"""The teacher is trained once, with a seed of its own, so that no student shares its data order."""

RANK = int(os.environ.get("RANK", "0"))
"""Of this process under torchrun; every process trains, the first one writes."""

MODULES = {"open_clip_torch": "open_clip"}
PACKAGES = ("cvlm", "torch", "transformers", "timm", "open_clip_torch", "accelerate", "deepspeed", "numpy")


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
        if phase not in self.recipe.phases:
            raise unknown_name("phase", phase, self.recipe.phases)
        if phase != "teacher" and seed not in self.recipe.seeds:
            raise CvlmError(f"seed {seed} is none of the recipe's seeds {list(self.recipe.seeds)}")
        self._check()
        self._open_folder()
        if phase == "teacher":
            self._train_teacher()
            return self.out / "teacher"
        start = self.recipe.start_of(phase)
        earlier = [] if start is None else [self.out / start / f"seed{seed}"]
        if "teacher" in self.recipe.phases and any(term.teacher_needs for term in self._objectives(phase)):
            earlier.append(self.out / "teacher")
        for folder in earlier:
            if not (folder / "config.json").exists():
                raise CvlmError(f"phase {phase!r} needs the model {folder}, which is missing; run its phase first")
        self._train_arm(phase, seed)
        return self.out / phase / f"seed{seed}"

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
        student = self._new_student(self.recipe.seeds[0])
        terms_of = {arm: self._objectives(arm) for arm in self.recipe.student_arms}
        taught = {arm for arm, terms in terms_of.items() if any(term.teacher_needs for term in terms)}
        teacher = self._teacher_preview() if taught else None
        for arm, terms in terms_of.items():
            check_teacher(student, teacher if arm in taught else None, terms)
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

    def _teacher_preview(self) -> Teacher | None:
        """The teacher as far as requirements go: a CVLM that will be trained here can be asked before it is."""
        spec = self.recipe.teacher
        if isinstance(spec, CvlmTeacherSpec):
            return load_teacher(self._compose(spec.model, TEACHER_SEED))
        return self.teacher if spec is not None else None

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
        spec = self.recipe.teacher
        if isinstance(spec, TransformersTeacherSpec):
            settings: dict[str, Any] = (
                {"head": spec.head, "answers": self.data.train.answers} if spec.head is not None else {}
            )
            return load_teacher(spec.name, kind=spec.kind, **settings).to(self.device)
        path = spec.path if isinstance(spec, SavedTeacherSpec) else self.out / "teacher"
        return load_teacher(path).to(self.device)

    @cached_property
    def target(self) -> TargetSource:
        """The teacher's signal for the training pairs: stored where every objective allows it."""
        train = self.data.train
        store = self.out / "features"
        bar = self.console.bar("teacher towers")
        inputs = teacher_inputs(self.teacher, train, store, device=self.device, progress=bar)
        live = LiveTarget(teacher=self.teacher, examples=train, inputs=inputs, device=self.device)
        request = self._teacher_request()
        if not request.fields <= STORABLE or TASKS[self.recipe.task].pictures > 1:
            return live
        length = self._longest_text(inputs)
        with self._alone("targets"), PhaseMeter(device=self.device) as meter:
            progress = self.console.bar("teacher targets")
            built = store_targets(live, request, self.out / "targets", text_length=length, progress=progress)
            meter.add(flops=built.flops, samples=built.samples)
        if built.samples:
            self._book("targets", "train", meter.cost)
        return built.source

    def _teacher_request(self) -> Request:
        """Union of what all arms ask of the teacher."""
        terms = [term for arm in self.recipe.student_arms for term in self._objectives(arm)]
        fusion = self.recipe.student.fusion
        return merged_requests(terms, 0 if fusion.kind == "none" else fusion.depth, self.teacher.depth)[1]

    def _longest_text(self, inputs: ModelInputs | None) -> int:
        if inputs is not None and not isinstance(inputs.text, torch.nn.Module):
            return inputs.text.mask.shape[1]
        # A token stands for a character at least, and no encoder here reads more than 512.
        return min(512, max(len(text) for text in self.data.train.texts) + 2)

    def _compose(self, spec: StudentSpec, seed: int) -> CVLM:
        torch.manual_seed(seed)
        return compose(spec, task=self.recipe.task, answers=self.data.train.answers)

    def _new_student(self, seed: int) -> CVLM:
        return self._compose(self.recipe.student, seed)

    def _objectives(self, arm: str) -> list[Objective]:
        specs = self.recipe.phases[arm].objectives
        return [build_objective(spec.kind, weight=spec.weight, **spec.settings) for spec in specs]

    def _inputs(self, model: CVLM, examples: Examples) -> ModelInputs:
        """Stored tower outputs of a model over a split, booked under `encode` when they are made."""
        store, bar = self.out / "features", self.console.bar(f"frozen towers, {examples.split} split")
        with self._alone("features"), PhaseMeter(device=self.device) as meter:
            inputs = model_inputs(model, examples, store, device=self.device, progress=bar, meter=meter)
        if meter.cost.samples:
            self._book("encode", f"{model.spec.vision.name} {examples.split}", meter.cost)
        return inputs

    # --- jobs ---------------------------------------------------------------------------------------------------

    def _train_teacher(self) -> None:
        folder = self.out / "teacher"
        assert isinstance(self.recipe.teacher, CvlmTeacherSpec)
        if not (folder / "scores.npz").exists():
            model = self._compose(self.recipe.teacher.model, TEACHER_SEED)
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
            terms = self._objectives(arm)
            target = self.target if any(term.teacher_needs for term in terms) else None
            train = self.data.train.hide_labels(self.recipe.data.labelled, seed)
            job = self._job(model, arm, seed, self._inputs(model, train), target)
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
            phase=self.recipe.phases[arm],
            objectives=self._objectives(arm),
            inputs=inputs,
            target=target,
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
        (folder / "log.json").write_text(json.dumps(log), encoding="utf-8")
        self._book(phase, key, cost)
        clear_checkpoints(folder)
        test = self._inputs(job.student, self.data.test)
        with PhaseMeter(device=self.device) as meter:
            prediction = predict(job.student, test, device=self.device)
            meter.add(flops=prediction.flops, samples=len(self.data.test))
        self._book("evaluate", f"{phase} {key}", meter.cost)
        score(self.recipe.task, self.data.test, prediction).save(folder / "scores.npz")

    def _alone(self, name: str) -> FileLock:
        """Let one process of several fill a store; the others then find it full."""
        return FileLock(self.out / f".{name}.lock")

    def _book(self, phase: str, key: str, cost: PhaseCost) -> None:
        self.ledger.add(phase, key, cost)

    def _copy_model(self, source: Path, target: Path) -> None:
        """Make the arm's own folder loadable: it holds the first seed's model."""
        for name in ("model.safetensors", "answers.json", "README.md", "config.json"):
            shutil.copyfile(source / name, target / name)

    # --- results ------------------------------------------------------------------------------------------------

    def _report(self) -> dict[str, Any]:
        arms: dict[str, list[Scores]] = {}
        if TASKS[self.recipe.task].output == "answers":
            arms["majority"] = [majority(self.data.train, self.data.test)]
        arms |= self.scores
        metrics = metrics_json(self.recipe.task, self.data.test.split, arms, compared_arms(list(arms)))
        write_atomic(self.out / "metrics.json", json.dumps(metrics, indent=2).encode())
        write_report(self.out)
        return metrics


def environment(device: str) -> dict[str, Any]:
    """Describe when, where and with which versions a run began."""
    return {
        "begun": datetime.now(UTC).isoformat(timespec="seconds"),
        "machine": machine_info(),
        "device": device,
        "threads": torch.get_num_threads(),
        "platform": platform.platform(),
        "python": platform.python_version(),
        "packages": {name: version(name) for name in PACKAGES if find_spec(MODULES.get(name, name)) is not None},
    }
