"""DoKTra's losses (Choi et al. 2022) as its authors' code computes them, written out in float64 loops."""

import math

import numpy as np
import pytest
import torch

import cvlm
from cvlm.training.module import PhaseModule
from distill import Request, Signal, build_objective

B, D, C = 7, 19, 5
GAMMA, BETA = 0.7, 0.5


def activation_boundary(student: np.ndarray, teacher: np.ndarray, margin: float = 1.0) -> float:
    """1 / (1000 B) sum over examples and units of the squared distance to the margin on the teacher's side of 0."""
    total = 0.0
    for row in range(len(student)):
        for s, t in zip(student[row], teacher[row], strict=True):
            if t <= 0 and s > -margin:
                total += (s + margin) ** 2
            if t > 0 and s <= margin:
                total += (s - margin) ** 2
    return total / (1000 * len(student))


def softmax(row: np.ndarray) -> list[float]:
    exponentials = [math.exp(value) for value in row]
    return [value / sum(exponentials) for value in exponentials]


def confidence_penalty(logits: np.ndarray, labels: np.ndarray, beta: float) -> float:
    """CE - beta H(p), averaged over examples."""
    total = 0.0
    for row, label in zip(logits, labels, strict=True):
        p = softmax(row)
        total += -math.log(p[label]) + beta * sum(value * math.log(value) for value in p)
    return total / len(logits)


@pytest.fixture
def batch() -> dict[str, np.ndarray]:
    draw = np.random.default_rng(5)
    teacher = draw.normal(size=(B, D)) * 2
    teacher[0, 0] = 0.0  # counts as not active
    return {
        "student": draw.normal(size=(B, D)) * 2,
        "teacher": teacher,
        "logits": draw.normal(size=(B, C)) * 3,
        "labels": draw.integers(0, C, B),
    }


class Given(torch.nn.Module):
    """A student whose signal is known beforehand."""

    def __init__(self, signal: Signal) -> None:
        super().__init__()
        self.signal = signal
        self.unused = torch.nn.Parameter(torch.zeros(()))

    def forward(self, image, text, *, request, labels):
        return self.signal


def total(batch: dict[str, np.ndarray], progress: float) -> dict[str, float]:
    """The loss of the recipe's phase at a point in time."""
    after = {"schedule": "switch", "from": 0.0, "at": GAMMA}
    terms = [
        build_objective("activation_boundary", weight={**after, "from": 1.0, "to": 0.0}),
        build_objective("labels", weight={**after, "to": 1.0}),
        build_objective("entropy", weight={**after, "to": BETA}),
    ]
    tensors = {name: torch.from_numpy(values) for name, values in batch.items()}
    student = Given(Signal(logits=tensors["logits"], pooled=tensors["student"]))
    module = PhaseModule(student, terms, Request())
    module.begin(progress)
    teacher = Signal(pooled=tensors["teacher"]) if module.reads_teacher else None
    return {name: float(v) for name, v in module(None, None, tensors["labels"], teacher, [B] * 3).items()}


@pytest.mark.parametrize("progress", [0.0, 0.35, 0.6999])
def test_first_stage_is_the_activation_boundary_alone(batch, progress):
    found = total(batch, progress)
    expected = activation_boundary(batch["student"], batch["teacher"])
    assert found.keys() == {"loss", "activation_boundary"}
    assert found["loss"] == pytest.approx(expected, rel=1e-6)


@pytest.mark.parametrize("progress", [0.7, 0.99])
def test_second_stage_is_labels_with_the_confidence_penalty(batch, progress):
    found = total(batch, progress)
    expected = confidence_penalty(batch["logits"], batch["labels"], BETA)
    assert found.keys() == {"loss", "labels", "entropy"}
    assert found["loss"] == pytest.approx(expected, rel=1e-5)


def test_the_calibrated_teacher_learns_by_the_same_penalty(batch):
    logits, labels = torch.from_numpy(batch["logits"]), torch.from_numpy(batch["labels"])
    terms = [build_objective("labels"), build_objective("entropy", weight=0.3)]
    value = sum(term.weight * term(Signal(logits=logits), None, labels)[0] / B for term in terms)
    assert float(value) == pytest.approx(confidence_penalty(batch["logits"], batch["labels"], 0.3), rel=1e-5)


def test_unequal_widths_meet_in_a_random_projection_that_never_trains(batch):
    term = build_objective("activation_boundary")
    student, teacher = torch.from_numpy(batch["student"]).float(), torch.randn(B, 11)
    term.prepare(Signal(pooled=student), Signal(pooled=teacher))
    assert not list(term.parameters())
    projection = term.adapters[0]
    projected = teacher @ projection.weight.T + 0.01
    expected = activation_boundary(student.double().numpy(), projected.double().numpy())
    assert float(term(Signal(pooled=student), Signal(pooled=teacher))[0]) / B == pytest.approx(expected, rel=1e-5)


def test_a_text_model_gives_what_the_recipe_reads():
    model = cvlm.build(vision=None, text="package:minilm_l6", task="text", answers=("a", "b"))
    assert {"logits", "pooled"} <= model.fields
