"""`cvlm run`: every phase of a recipe, evaluation, statistics, cost, report. Interrupted runs go on where they were.

A run is a list of jobs, each with a mark on disk that is written last: stored tower outputs, the teacher, its targets,
and one job per student arm and seed. Running the same recipe into the same folder skips what is marked.
"""

import json
import os
import shutil
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

import yaml

from benchmarks.captions import shown_captions
from benchmarks.compare import compared_arms, metrics_json
from benchmarks.contamination import shared_between
from benchmarks.environment import environment
from benchmarks.tasks import Scores, majority, score
from cvlm.cli.experiment import TEACHER_SEED, Experiment
from cvlm.cli.lineage import training_record
from cvlm.cli.preflight import check_earlier_phases, check_experiment
from cvlm.config import EmaTeacherSpec, PeerTeacherSpec
from cvlm.cost import PhaseMeter
from cvlm.data.training_record import beyond_first, source_of
from cvlm.errors import CvlmError, unknown_name
from cvlm.files import write_atomic
from cvlm.lineage import TRAINING_DATA, DataSource
from cvlm.model import CVLM, load_model, save_model
from cvlm.report import write_report
from cvlm.tasks import TASKS
from cvlm.training import (
    LiveTarget,
    ModelInputs,
    PhaseJob,
    TargetSource,
    clear_checkpoints,
    initialise_from_teacher,
    predict,
    train_phase,
)

RANK = int(os.environ.get("RANK", "0"))
"""Of this process under torchrun; every process trains, the first one writes."""


@dataclass
class Run:
    """The jobs of one experiment.

    Attributes:
        experiment: what the jobs are made of, and the run folder.
        scores: of every arm that is trained, one per seed.
    """

    experiment: Experiment
    scores: dict[str, list[Scores]] = field(default_factory=dict)

    def execute(self) -> dict[str, Any]:
        """Run every job that is not done, write every result, and return metrics.json."""
        if int(os.environ.get("WORLD_SIZE", "1")) > 1:
            raise CvlmError("cvlm run is one process; under torchrun, use cvlm train for one phase after the other")
        recipe = self.experiment.recipe
        check_experiment(self.experiment)
        self._open_folder()
        if "teacher" in recipe.phases:
            self._train_teacher()
        for seed in recipe.seeds:
            for arm in recipe.student_arms:
                self._train_arm(arm, seed)
        return self._report()

    def execute_phase(self, phase: str, seed: int) -> Path:
        """Run one phase, on what earlier phases left in the folder; returns the model's folder."""
        recipe = self.experiment.recipe
        known = dict.fromkeys([*recipe.phases, *recipe.student_arms])
        if phase not in known:
            raise unknown_name("phase", phase, known)
        if phase != "teacher" and seed not in recipe.seeds:
            raise CvlmError(f"seed {seed} is none of the recipe's seeds {list(recipe.seeds)}")
        check_experiment(self.experiment)
        self._open_folder()
        if phase == "teacher":
            self._train_teacher()
        else:
            check_earlier_phases(self.experiment, phase, seed)
            self._train_arm(phase, seed)
        return self.experiment.folder(phase, seed)

    def store_teacher(self) -> list[str]:
        """Train the teacher where the recipe does, and store all that it is asked; no student is trained.

        Returns:
            One line about each thing that is stored, or why it cannot be.
        """
        recipe, out = self.experiment.recipe, self.experiment.out
        taught = any(map(self.experiment.taught, recipe.teacher_arms))
        imitating = any(map(self.experiment.imitates, recipe.teacher_arms))
        if not taught and not imitating:
            raise CvlmError("no phase of the recipe reads a teacher, so there is nothing to store")
        if isinstance(recipe.teacher, EmaTeacherSpec | PeerTeacherSpec):
            raise CvlmError(f"a teacher of kind {recipe.teacher.kind} comes about as the student trains")
        check_experiment(self.experiment)
        self._open_folder()
        if "teacher" in recipe.phases:
            self._train_teacher()
        lines = []
        if taught:
            stored = not isinstance(self.experiment.target, LiveTarget)
            said = f"targets of {len(self.experiment.data.train)} pairs in {out / 'targets'}"
            lines.append(said if stored else "no targets: the objectives need the teacher beside the student")
        if imitating:
            counts = self.experiment.imitation.provenance["counts"]
            lines.append(f"answers to {counts['asked']} questions in {out / 'imitation'}, {counts['kept']} kept")
        return lines

    def _open_folder(self) -> None:
        """Make the folder, or recognise it as an interrupted run of the same recipe."""
        out = self.experiment.out
        resolved = yaml.safe_dump(json.loads(self.experiment.recipe.model_dump_json()), sort_keys=False)
        path = out / "recipe.yaml"
        try:
            if path.exists() and path.read_text(encoding="utf-8") != resolved:
                raise CvlmError(f"{out} holds a run of another recipe; choose another --out, or delete the folder")
            out.mkdir(parents=True, exist_ok=True)
            path.write_text(resolved, encoding="utf-8")
            if not (out / "environment.json").exists():  # a resumed run keeps the date and place of its beginning
                text = json.dumps(environment(self.experiment.device), indent=2)
                (out / "environment.json").write_text(text, encoding="utf-8")
        except OSError as error:
            raise CvlmError(f"cannot write to the run folder {out}: {error.strerror}") from error

    # --- jobs ---------------------------------------------------------------------------------------------------

    def _train_teacher(self) -> None:
        folder = self.experiment.folder("teacher", TEACHER_SEED)
        spec = self.experiment.recipe.trained_teacher
        assert spec is not None
        if not (folder / "scores.npz").exists():
            model = self.experiment.new_model(spec.model, TEACHER_SEED)
            inputs = self.experiment.inputs(model, self.experiment.data.train)
            self._train_and_score(self._job(model, "teacher", TEACHER_SEED, inputs, None), "teacher", "teacher")
        if RANK == 0:
            self.scores["teacher"] = [Scores.load(folder / "scores.npz")]

    def _train_arm(self, arm: str, seed: int) -> None:
        experiment, recipe = self.experiment, self.experiment.recipe
        folder = experiment.folder(arm, seed)
        if not (folder / "scores.npz").exists():
            start = recipe.start_of(arm)
            model = experiment.new_student(seed) if start is None else load_model(experiment.folder(start, seed))
            if start is None and recipe.initialise_fusion == "teacher":
                initialise_from_teacher(model, experiment.teacher)
            shown = experiment.data.train.hide_labels(recipe.data.labelled, seed)
            inputs = experiment.inputs(model, experiment.imitation.examples if experiment.imitates(arm) else shown)
            job = self._job(model, arm, seed, inputs, experiment.arm_target(arm, seed, inputs))
            self._train_and_score(job, arm, f"seed{seed}")
        if RANK > 0:
            return
        if seed == recipe.seeds[0]:
            self._copy_model(folder, experiment.out / arm)
        self.scores.setdefault(arm, []).append(Scores.load(folder / "scores.npz"))

    def _job(self, model: CVLM, phase: str, seed: int, inputs: ModelInputs, target: TargetSource | None) -> PhaseJob:
        return PhaseJob(
            student=model,
            phase=self.experiment.recipe.phase_of(phase),
            objectives=self.experiment.objectives(phase),
            inputs=inputs,
            target=target,
            stream=self.experiment.data.stream,
            engine=self.experiment.recipe.engine,
            seed=seed,
            folder=self.experiment.folder(phase, seed),
            report=self.experiment.console.steps(f"{phase}, seed {seed}" if phase != "teacher" else "teacher"),
        )

    def _train_and_score(self, job: PhaseJob, phase: str, key: str) -> None:
        experiment, folder = self.experiment, job.folder
        cost, log = train_phase(job)
        if RANK > 0:
            return  # one process writes
        job.student.training_record = training_record(
            experiment.recipe,
            experiment.out,
            phase,
            seed=job.seed,
            taught=job.target is not None or job.phase.labels == "teacher",
            own=self._train_source,
            beyond=(beyond_first(job.inputs.examples),) if job.stream is not None else (),
        )
        save_model(job.student, folder)
        (folder / "log.json").write_text(json.dumps(log, sort_keys=True), encoding="utf-8")  # as checkpoints keep it
        experiment.ledger.add(phase, key, cost)
        clear_checkpoints(folder)
        test = experiment.inputs(job.student, experiment.data.test)
        with PhaseMeter(device=experiment.device) as meter:
            prediction = predict(job.student, test, device=experiment.device)
            meter.add(flops=prediction.flops, samples=len(experiment.data.test))
        experiment.ledger.add("evaluate", f"{phase} {key}", meter.cost)
        if prediction.captions is not None:
            shown = shown_captions(experiment.data.test, prediction.captions)
            write_atomic(folder / "captions.json", json.dumps(shown, indent=1, ensure_ascii=False).encode())
        score(experiment.recipe.task, experiment.data.test, prediction).save(folder / "scores.npz")

    @cached_property
    def _train_source(self) -> DataSource:
        """The training split, for the record of what a model was trained on."""
        return source_of(self.experiment.data.train, self.experiment.console.bar("hashing training pictures"))

    def _copy_model(self, source: Path, target: Path) -> None:
        """Make the arm's own folder loadable: it holds the first seed's model."""
        for name in ("model.safetensors", "answers.json", "README.md", TRAINING_DATA, "config.json"):
            shutil.copyfile(source / name, target / name)

    # --- results ------------------------------------------------------------------------------------------------

    def _report(self) -> dict[str, Any]:
        task, data, out = self.experiment.recipe.task, self.experiment.data, self.experiment.out
        arms: dict[str, list[Scores]] = {}
        if TASKS[task].output != "similarity" and data.stream is None:
            arms["majority"] = [majority(data.train, data.test)]
        arms |= self.scores
        metrics = metrics_json(task, data.test.split, arms, compared_arms(list(arms)))
        metrics["contamination"] = shared_between(data.train, data.test).as_json()
        if data.stream is not None:
            metrics["contamination"]["first_training_pairs_only"] = len(data.train)
        metrics["skipped"] = {"train": self._skipped_training(), "test": list(data.test.skipped)}
        write_atomic(out / "metrics.json", json.dumps(metrics, indent=2).encode())
        write_report(out)
        return metrics

    def _skipped_training(self) -> list[str]:
        """Return the training samples that were broken and left out: found at loading, or in a stream on the way."""
        files = self.experiment.out.glob("**/skipped-*.jsonl")
        lines = [line for file in files for line in file.read_text().splitlines()]
        return [*self.experiment.data.train.skipped, *sorted({json.loads(line) for line in lines})]
