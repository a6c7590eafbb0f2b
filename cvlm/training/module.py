"""The one module that the trainer, DDP or DeepSpeed wraps: the student and the objectives' train-only adapters."""

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from cvlm.model import CVLM
from cvlm.training.weights import TermWeights, gradient_norm
from distill import Objective, Request, Signal

GRADIENT = "gradient/"
"""Stands before a term's name where the norm of its gradient is meant."""


class PhaseModule(nn.Module):
    """A student and the terms of its loss.

    Calling an inner module instead would skip the wrapper's forward pass, and gradients would stop being averaged.

    Args:
        student: the model that is trained.
        objectives: the terms; their adapters train along and are left out of the saved student.
        request: what the student's forward pass records.
        balance: whether the terms' weights follow the norms of their gradients.
    """

    def __init__(
        self, student: CVLM, objectives: Sequence[Objective], request: Request, *, balance: bool = False
    ) -> None:
        super().__init__()
        self.student = student
        self.objectives = nn.ModuleList(objectives)
        self.request = request
        self._terms = list(objectives)  # the same modules, with their own type
        self.weights = TermWeights(objectives, self.terms, balance=balance)
        self._measures = False

    def begin(self, progress: float, *, measure: bool = False) -> None:
        """Say where in the phase the next forward pass stands, and whether it measures gradients."""
        for module in self.modules():
            if isinstance(module, PhaseModule):
                module.weights.progress, module._measures = progress, measure

    @property
    def terms(self) -> list[str]:
        """One name per objective, numbered where a kind occurs twice."""
        kinds = [objective.kind for objective in self._terms]
        return [kind if kinds.count(kind) == 1 else f"{kind}_{i}" for i, kind in enumerate(kinds)]

    @property
    def reads_teacher(self) -> bool:
        """Whether a term that is computed now needs the teacher's signal."""
        return any(
            weight and objective.teacher_needs
            for weight, objective in zip(self.weights.values(), self._terms, strict=True)
        )

    def counts(self, labels: Tensor | None, examples: int) -> list[int]:
        """Return how many of a batch's examples each term counts."""
        return [objective.count(labels, examples) for objective in self._terms]

    def forward(
        self, image: Any, text: Any, labels: Tensor | None, teacher: Signal | None, divisors: Sequence[float]
    ) -> dict[str, Tensor]:
        """Run the student and compare.

        Args:
            image: image inputs of `b` pairs.
            text: text inputs of `b` pairs.
            labels: `[b]` or `[b, n_answers]`, see `Objective.forward`.
            teacher: the target.
            divisors: what each term's sum is divided by: its count over the whole optimiser step.

        Returns:
            `loss`, the weighted total, and each term's unweighted value under its name. A term whose weight is 0 now is
            not computed. Where gradients are measured, also `gradient/NAME`: the norm of the gradient of each term's
            unweighted value at the student's shared parameters.
        """
        signal = self.student(image, text, request=self.request, labels=labels)
        return self.compare(signal, teacher, labels, divisors)

    def prepare(self, image: Any, text: Any, labels: Tensor | None, teacher: Signal | None) -> None:
        """Make the objectives' adapters from one batch; arguments as of `forward`."""
        signal = self.student(image, text, request=self.request, labels=labels)
        for objective in self._terms:
            objective.prepare(signal, teacher)

    def compare(
        self, signal: Signal, teacher: Signal | None, labels: Tensor | None, divisors: Sequence[float]
    ) -> dict[str, Tensor]:
        """Compare a signal of the student; arguments and result as of `forward`."""
        values: dict[str, Tensor] = {}
        total = torch.zeros((), device=next(self.student.parameters()).device)
        weights = self.weights.values()
        for name, objective, divisor, weight in zip(self.terms, self._terms, divisors, weights, strict=True):
            if weight == 0:
                continue
            summed, _ = objective(signal, teacher, labels)
            values[name] = summed / max(divisor, 1)
            total = total + weight * values[name]
        norms: dict[str, Tensor] = {}
        if self._measures:
            shared = self.student.shared_parameters
            norms = {f"{GRADIENT}{name}": gradient_norm(value, shared) for name, value in values.items()}
        return {"loss": total, **{name: value.detach() for name, value in values.items()}, **norms}


class Absent(nn.Module):
    """Stands in for a tower whose outputs are stored, so that it is neither moved, wrapped nor checkpointed."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.width = width

    def forward(self, **_: Tensor) -> None:
        """Refuse to run."""
        raise RuntimeError("this tower's outputs are stored; it was taken out of the model while training")


@contextmanager
def towers_set_aside(model: CVLM, towers: frozenset[str]) -> Iterator[None]:
    """Take towers out of a model for a while."""
    kept: Mapping[str, nn.Module] = {tower: getattr(model, tower) for tower in towers}
    for tower, module in kept.items():
        setattr(model, tower, Absent(module.width))  # type: ignore[arg-type]
    try:
        yield
    finally:
        for tower, module in kept.items():
            setattr(model, tower, module)
