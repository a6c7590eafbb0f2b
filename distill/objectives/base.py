"""What every objective is: a small module that turns two signals into `(sum, count)`."""

from collections.abc import Mapping, Sequence
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from distill.alignment import LayerMap, check_layers, resolve_layers
from distill.errors import DistillError
from distill.schedule import Weight, parse_weight
from distill.signal import Layers, Request, Signal

Loss = tuple[Tensor, Tensor]
"""Sum of per-example losses (scalar) and the number of examples in it (scalar)."""


class Objective(nn.Module):
    """One term of a loss.

    A subclass states the signal fields it needs on both sides, and returns the *sum* over examples and their *count*;
    the trainer alone divides, so that gradient accumulation and ragged batches leave the scale unchanged. Trainable
    adapters (regressors) are made by `prepare` from one batch of both signals.

    Args:
        weight: factor of this term in the total loss, a number or a schedule over the phase's steps (see
            `distill.schedule`); applied by the trainer, not by `forward`.
    """

    kind: ClassVar[str]
    source: ClassVar[str]
    student_needs: frozenset[str] = frozenset()
    teacher_needs: frozenset[str] = frozenset()

    def __init__(self, *, weight: Weight | Mapping[str, Any] = 1.0) -> None:
        super().__init__()
        try:
            self.weight = parse_weight(weight)
        except DistillError as error:
            raise DistillError(f"objective {self.kind!r}: {error}") from error

    def missing(self, student: frozenset[str], teacher: frozenset[str]) -> dict[str, frozenset[str]]:
        """Return the needed fields that a student and a teacher with these fields cannot give, by side."""
        return {"student": self.student_needs - student, "teacher": self.teacher_needs - teacher}

    def requests(self, student_depth: int, teacher_depth: int) -> tuple[Request, Request]:
        """Say what the student's and the teacher's forward passes must record."""
        return Request(fields=self.student_needs), Request(fields=self.teacher_needs)

    def match(self, student: Sequence[str], teacher: Sequence[str] | None) -> None:
        """Compare the answer vocabularies of both sides, before the first step.

        Args:
            student: the student's answers in the order of its logits; empty for tasks without answers.
            teacher: the teacher's; None where it does not say.

        Raises:
            DistillError: answers are compared one by one, and the vocabularies differ.
        """
        if self.teacher_needs & {"logits", "top_logits"} and teacher is not None and tuple(teacher) != tuple(student):
            raise DistillError(
                f"objective {self.kind!r} compares answer by answer; the teacher answers over {len(teacher)} answers "
                f"and the student over {len(student)}, or in another order; give both the same vocabulary"
            )

    def prepare(self, student: Signal, teacher: Signal | None) -> None:
        """Make adapters that fit both signals; does nothing when there are none or they exist."""

    def count(self, labels: Tensor | None, examples: int) -> int:
        """Return how many of a batch's examples this term counts, before any forward pass."""
        return examples

    def forward(self, student: Signal, teacher: Signal | None, labels: Tensor | None = None) -> Loss:
        """Compare the signals.

        Args:
            student: the trained model's signal.
            teacher: the target, detached; None for objectives without `teacher_needs`.
            labels: `[b]` class or group index, -100 where there is no label; or `[b, n_answers]` soft scores, rows of
                -100 where there is no label; or `[b, T]` integers, the words of captions, -100 behind the last.

        Raises:
            DistillError: a needed field is None, or shapes cannot be aligned.
        """
        raise NotImplementedError

    def take(self, signal: Signal | None, side: str, field: str) -> object:
        """Return a field that `forward` needs, or say who promised it and failed."""
        value = None if signal is None else getattr(signal, field)
        if value is None:
            raise DistillError(f"objective {self.kind!r} needs the field {field!r} of the {side}, which gave none")
        return value


class LayerObjective(Objective):
    """An objective over pairs of fusion layers.

    Args:
        layers: `last`, `uniform`, or pairs `[[student, teacher], ...]`; see `distill.alignment.resolve_layers`.
        weight: factor of this term.
    """

    def __init__(self, *, layers: LayerMap = "last", weight: float = 1.0) -> None:
        super().__init__(weight=weight)
        check_layers(layers)
        self.layers = layers
        self._resolved: list[tuple[int, int]] | None = None

    def resolve(self, student_depth: int, teacher_depth: int) -> list[tuple[int, int]]:
        """Return the layer map's pairs for models of these depths, and keep to them from now on."""
        self._resolved = resolve_layers(self.layers, student_depth, teacher_depth)
        return self._resolved

    def pairs(self, student: Layers, teacher: Layers) -> list[tuple[Tensor, Tensor]]:
        """Pair up the recorded layers of two signals.

        Where `resolve` never ran, the last recorded layer counts as the model's last one.
        """
        chosen = self._resolved or resolve_layers(self.layers, max(student) + 1, max(teacher) + 1)
        absent = [pair for pair in chosen if pair[0] not in student or pair[1] not in teacher]
        if absent:
            raise DistillError(f"objective {self.kind!r}: layers {absent} were not recorded")
        return [(student[s], teacher[t].detach()) for s, t in chosen]


def example_mean(rows: Tensor, exists: Tensor, pictures: int = 1) -> Loss:
    """Average rows within each example, over existing rows only; sum over the examples that have any.

    Args:
        rows: `[b * pictures, r]`, those of an example's pictures next to each other.
        exists: likewise, True where a row counts.
        pictures: how many pictures an example shows.
    """
    rows, exists = (part.unflatten(0, (-1, pictures)).flatten(1) for part in (rows, exists))
    number = exists.sum(-1)
    mean = (rows * exists).sum(-1) / number.clamp_min(1)
    return mean.sum(), (number > 0).sum()


def labelled_rows(labels: Tensor) -> Tensor:
    """Return `[b]` True where a label is present."""
    return labels >= 0 if labels.dim() == 1 else labels[:, 0] >= 0


def count_words(labels: Tensor | None) -> int | None:
    """Return how many words `[b, T]` integer labels hold; None for labels of any other kind."""
    if labels is None or labels.dim() == 1 or labels.is_floating_point():
        return None
    return int((labels >= 0).sum())


def zero_like(tensor: Tensor) -> Tensor:
    """A zero that keeps the graph, so that every rank runs a backward pass of the same shape."""
    return torch.nan_to_num(tensor * 0.0).sum()  # in this order: a sum may overflow, and 0 * inf is NaN
