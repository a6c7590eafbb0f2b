"""The one module that the trainer, DDP or DeepSpeed wraps: the student and the objectives' train-only adapters."""

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from cvlm.model import CVLM
from distill import Objective, Request, Signal


class PhaseModule(nn.Module):
    """A student and the terms of its loss.

    Calling an inner module instead would skip the wrapper's forward pass, and gradients would stop being averaged.

    Args:
        student: the model that is trained.
        objectives: the terms; their adapters train along and are left out of the saved student.
        request: what the student's forward pass records.
    """

    def __init__(self, student: CVLM, objectives: Sequence[Objective], request: Request) -> None:
        super().__init__()
        self.student = student
        self.objectives = nn.ModuleList(objectives)
        self.request = request
        self._terms = list(objectives)  # the same modules, with their own type

    @property
    def terms(self) -> list[str]:
        """One name per objective, numbered where a kind occurs twice."""
        kinds = [objective.kind for objective in self._terms]
        return [kind if kinds.count(kind) == 1 else f"{kind}_{i}" for i, kind in enumerate(kinds)]

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
            `loss`, the weighted total, and each term's unweighted value under its name.
        """
        signal = self.student(image, text, request=self.request, labels=labels)
        values: dict[str, Tensor] = {}
        total = torch.zeros((), device=next(self.student.parameters()).device)
        for name, objective, divisor in zip(self.terms, self._terms, divisors, strict=True):
            summed, _ = objective(signal, teacher, labels)
            values[name] = summed / max(divisor, 1)
            total = total + objective.weight * values[name]
        return {"loss": total, **{name: value.detach() for name, value in values.items()}}


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
