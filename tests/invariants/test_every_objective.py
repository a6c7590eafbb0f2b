"""Every objective by name: a one-page recipe of twenty steps on quickstart data, and what it refuses."""

from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml

from cvlm.api import check_teacher
from cvlm.config import Recipe, StudentSpec, TextSpec, VisionSpec, load_recipe, parse_recipe
from cvlm.data import Examples, load_data
from cvlm.encoders import load_text_encoder, load_vision_encoder
from cvlm.model import CVLM, compose
from cvlm.training import CvlmTeacher, LiveTarget, ModelInputs, PhaseJob, model_inputs, train_phase
from distill import OBJECTIVES, DistillError, Objective, Request, Signal, build_objective, check_requirements

STEPS = 20
PAIRS = {"vqa": 32, "retrieval": 12}
"""A retrieval teacher scores every picture with every text."""

# Every pair in every step, no dropout, one rate: what changes from step to step is the student alone.
RECIPE = """
task: {task}
data: {{kind: {data}, limit: {pairs}}}
student:
  vision: {{name: "package:efficientnet_lite0", image_size: 64, layer: 3}}
  text: {{name: "package:minilm_l6"}}
  fusion: {{kind: cross, width: 32, depth: 1, heads: 4, dropout: 0.0}}
teacher:
  kind: cvlm
  vision: {{name: "package:efficientnet_lite0", image_size: 96, layer: 3}}
  text: {{name: "package:minilm_l6"}}
  fusion: {{kind: merged, width: 48, depth: 2, heads: 6, dropout: 0.0}}
phases:
  teacher: {{epochs: 15, batch_size: 32, learning_rate: 0.003, objectives: [labels]}}
  distill:
    epochs: 20
    batch_size: 32
    pairs: all
    learning_rate: 0.003
    schedule: constant
    warmup: 0
    objectives: [{objective}]
seeds: [0]
engine: {{device: cpu}}
"""

SETTINGS: dict[str, dict[str, object]] = {
    "labels": {},
    "logits": {"temperature": 2.0},
    "similarity": {},
    "jsd": {"beta": 0.5},
    "reverse_kl": {},
    "symmetric_kl": {},
    "tvd": {},
    "logit_mse": {},
    "top_k": {"k": 5},
    "dkd": {},
    "ranking": {"method": "listnet"},
    "focal": {"gamma": 2.0},
    "entropy": {},
    "cross_attention": {"layers": "last", "heads": "mean"},
    "value_relation": {"relation_heads": 8},
    "hidden": {},
    "activation_boundary": {},
    "pkt": {},
    "relational": {},
    "similarity_preserving": {},
    "correlation": {},
    "dist": {},
    "internal_external": {},
    "vid": {},
    "crd": {},
    "contrastive": {},
    "mutual": {},
    "heterogeneous": {"reads": "pooled"},
    "continual": {},
}
"""What a recipe writes beside the name."""

ON_RETRIEVAL = {"similarity", "contrastive"}
every = pytest.mark.parametrize("kind", OBJECTIVES)


def recipe_of(kind: str, task: str) -> Recipe:
    objective = yaml.safe_dump({"kind": kind, **SETTINGS[kind]}, default_flow_style=True).strip()
    data = "easy_vqa" if task == "vqa" else "openmoji"
    return parse_recipe(yaml.safe_load(RECIPE.format(task=task, data=data, pairs=PAIRS[task], objective=objective)))


def task_of(kind: str) -> str:
    return "retrieval" if kind in ON_RETRIEVAL else "vqa"


def objective_of(kind: str, task: str) -> Objective:
    (spec,) = recipe_of(kind, task).phases["distill"].objectives
    return build_objective(spec.kind, weight=spec.weight, **spec.settings)


@dataclass(frozen=True)
class Parts:
    """What all kinds share, made once: frozen towers, stored outputs, and one trained teacher per task."""

    folder: Path

    @cached_property
    def text(self) -> torch.nn.Module:
        return load_text_encoder(TextSpec(name="package:minilm_l6"))

    @cached_property
    def visions(self) -> dict[int | None, torch.nn.Module]:
        name = "package:efficientnet_lite0"
        return {size: load_vision_encoder(VisionSpec(name=name, image_size=size, layer=3)) for size in (64, 96)}

    @cached_property
    def examples(self) -> dict[str, Examples]:
        return {task: load_data(recipe_of("labels", task).data, task).train for task in PAIRS}

    @cached_property
    def teachers(self) -> dict[str, CvlmTeacher]:
        return {task: self._teach(task) for task in PAIRS}

    @cached_property
    def students(self) -> dict[str, CVLM]:
        """Untrained students, to be asked and never trained."""
        return {task: self.compose(recipe_of("labels", task).student, task) for task in PAIRS}

    @cached_property
    def inputs(self) -> dict[tuple[str, str], ModelInputs]:
        """Stored tower outputs of the student and of the teacher, by task and side."""
        found = {}
        for task, examples in self.examples.items():
            recipe = recipe_of("labels", task)
            assert recipe.trained_teacher is not None
            for side, spec in (("student", recipe.student), ("teacher", recipe.trained_teacher.model)):
                found[task, side] = model_inputs(self.compose(spec, task), examples, self.folder)
        return found

    def compose(self, spec: StudentSpec, task: str) -> CVLM:
        torch.manual_seed(0)
        answers, vision = self.examples[task].answers, self.visions[spec.vision.image_size]
        return compose(spec, task=task, answers=answers, vision=vision, text=self.text)

    def _teach(self, task: str) -> CvlmTeacher:
        recipe = recipe_of("labels", task)
        assert recipe.trained_teacher is not None
        model = self.compose(recipe.trained_teacher.model, task)
        job = PhaseJob(
            student=model,
            phase=recipe.phases["teacher"],
            objectives=[build_objective("labels")],
            inputs=self.inputs[task, "teacher"],
            engine=recipe.engine,
            folder=self.folder / f"teacher-{task}",
        )
        train_phase(job)
        return CvlmTeacher(model)


@pytest.fixture(scope="module")
def parts(tmp_path_factory: pytest.TempPathFactory) -> Parts:
    return Parts(tmp_path_factory.mktemp("parts"))


def test_the_table_holds_every_objective_and_no_other() -> None:
    assert set(SETTINGS) == set(OBJECTIVES)


def test_the_example_recipe_writes_every_objective_of_answering() -> None:
    recipe = load_recipe(Path(__file__).parents[2] / "configs" / "recipes" / "objectives.yaml")
    specs = [spec for phase in recipe.phases.values() for spec in phase.objectives]
    built = {build_objective(spec.kind, weight=spec.weight, **spec.settings).kind for spec in specs}
    assert built == set(OBJECTIVES) - ON_RETRIEVAL


@every
def test_runs_from_a_recipe_with_a_falling_loss(parts: Parts, tmp_path: Path, kind: str) -> None:
    task = task_of(kind)
    recipe, teacher, objective = recipe_of(kind, task), parts.teachers[task], objective_of(kind, task)
    student = parts.compose(recipe.student, task)
    reads = bool(objective.teacher_needs)
    check_teacher(student, teacher if reads else None, [objective])
    examples = parts.examples[task]
    target = LiveTarget(teacher=teacher, examples=examples, inputs=parts.inputs[task, "teacher"]) if reads else None
    job = PhaseJob(
        student=student,
        phase=recipe.phases["distill"],
        objectives=[objective],
        inputs=parts.inputs[task, "student"],
        target=target,
        engine=recipe.engine,
        folder=tmp_path,
    )
    _, log = train_phase(job)
    values = [record[f"term/{kind}"] for record in log]
    assert len(values) == STEPS
    assert np.isfinite(values).all()
    assert np.mean(values[-3:]) < np.mean(values[:3]), values


class NoTeacher:
    """Gives nothing that an objective could read."""

    name, fields, depth, fingerprint = "of no use", frozenset(), 0, ""

    def prepare(self, images: object, texts: object) -> dict[str, object]:
        return {}

    def signal(self, inputs: object, request: Request) -> Signal:
        return Signal()

    def to(self, device: object) -> "NoTeacher":
        return self


@every
def test_refuses_a_teacher_that_gives_nothing_by_name(parts: Parts, kind: str) -> None:
    task = task_of(kind)
    objective = objective_of(kind, task)
    student = parts.students[task]
    if not objective.teacher_needs:
        check_teacher(student, None, [objective])
        return
    field = sorted(objective.teacher_needs)[0]
    for teacher, name in ((NoTeacher(), "of no use"), (None, r"\(none\)")):
        with pytest.raises(DistillError, match=f"objective '{kind}' needs {field}.* of the teacher {name}, .*nothing"):
            check_teacher(student, teacher, [objective])


@every
def test_refuses_the_task_that_it_cannot_serve_by_name(parts: Parts, kind: str) -> None:
    """Retrieval has no logits, answering no similarity; labels alone serve both, and refuse a model without outputs."""
    other = "retrieval" if task_of(kind) == "vqa" else "vqa"
    objective = objective_of(kind, other)
    student = parts.students[other]
    if kind == "labels":
        check_teacher(student, None, [objective])
        with pytest.raises(DistillError, match="objective 'labels' needs logits of the student, which gives hidden"):
            check_requirements([objective], frozenset({"hidden"}), frozenset(), "(none)")
        return
    with pytest.raises(DistillError, match=rf"objective '{kind}' needs .* of the student, which gives .*layout"):
        check_teacher(student, parts.teachers[other], [objective])
