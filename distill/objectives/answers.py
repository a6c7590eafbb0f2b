"""What objectives on answer logits `[b, n_answers]` share: checks, log-probabilities without infinities, z-scores."""

import math

import torch
import torch.nn.functional as F
from torch import Tensor

from distill.errors import DistillError
from distill.objectives.base import Objective, labelled_rows
from distill.signal import Signal

LOG_ZERO = -1e4
"""Stands for log 0: where a probability is exactly zero, 0 * -inf would be NaN."""

NORMALISE = ("none", "z_score")


def check_choice(objective: Objective, name: str, value: object, choices: tuple[str, ...]) -> None:
    """Refuse a setting that is none of its choices.

    Raises:
        DistillError: naming the setting, its value and the choices.
    """
    if value not in choices:
        raise DistillError(f"objective {objective.kind!r}: {name} is {value!r}; use one of {', '.join(choices)}")


def check_positive(objective: Objective, name: str, value: float, *, zero: bool = False) -> None:
    """Refuse a setting that is not finite, or not above 0 (`zero`: below 0).

    Raises:
        DistillError: naming the setting and its value.
    """
    if not (0 < value < math.inf or (zero and value == 0)):
        wanted = "not negative" if zero else "above 0"
        raise DistillError(f"objective {objective.kind!r}: {name} is {value}, it must be finite and {wanted}")


def check_whole(objective: Objective, name: str, value: object, *, least: int) -> None:
    """Refuse a setting that is no whole number of at least `least`.

    Raises:
        DistillError: naming the setting and its value.
    """
    if not isinstance(value, int) or isinstance(value, bool) or value < least:
        raise DistillError(
            f"objective {objective.kind!r}: {name} is {value!r}, it must be a whole number of at least {least}"
        )


def answer_logits(objective: Objective, signal: Signal | None, side: str) -> Tensor:
    """Return the logits `[b, n_answers]` of a side in single precision.

    Raises:
        DistillError: there are none, or they are not one row of answers per example.
    """
    logits = objective.take(signal, side, "logits")
    assert isinstance(logits, Tensor)
    if logits.dim() != 2:
        raise DistillError(
            f"objective {objective.kind!r} compares one row of answers per example; the {side} gave logits of shape "
            f"{tuple(logits.shape)}. Use the objective 'logits' for answers of several words"
        )
    return logits.float()


def check_same_answers(objective: Objective, student: Tensor, teacher: Tensor, what: str = "logits") -> None:
    """Refuse logits over different vocabularies.

    Raises:
        DistillError: with both shapes.
    """
    if student.shape != teacher.shape:
        raise DistillError(
            f"objective {objective.kind!r}: student {what} {tuple(student.shape)} and teacher {what} "
            f"{tuple(teacher.shape)} differ; both must be over the same "
            f"{'vocabulary' if what == 'logits' else 'batch'}"
        )


def hard_labels(objective: Objective, labels: Tensor | None, remedy: str) -> tuple[Tensor, Tensor]:
    """Return `[b]` class labels and `[b]` True where there is one.

    Args:
        objective: who asks.
        labels: what `forward` was given.
        remedy: what to do about soft scores, for the message.

    Raises:
        DistillError: there are no labels, or they are soft scores `[b, n_answers]`.
    """
    if labels is None:
        raise DistillError(f"objective {objective.kind!r} was given no labels; take it out where there are none")
    if labels.dim() != 1:
        raise DistillError(
            f"objective {objective.kind!r} needs one right answer per example, but the labels are soft scores "
            f"{tuple(labels.shape)}; {remedy}"
        )
    return labels, labelled_rows(labels)


def log_probabilities(logits: Tensor) -> Tensor:
    """Log-softmax over the last axis with `LOG_ZERO` for answers that are excluded by a logit of -inf."""
    log_p = F.log_softmax(logits, dim=-1)
    return log_p.masked_fill(log_p == -math.inf, LOG_ZERO)


def kl(log_p: Tensor, log_q: Tensor) -> Tensor:
    """`KL(p || q)` of log-probabilities `[..., c]`, one value per row."""
    return (log_p.exp() * (log_p - log_q)).sum(-1)


def z_score(logits: Tensor) -> Tensor:
    """Bring each row to mean 0 and standard deviation 1 (Sun et al. 2024, algorithm 1); excluded answers stay -inf.

    A row of equal logits becomes all zero.
    """
    given = logits > -math.inf
    number = given.sum(-1, keepdim=True)
    centred = logits.masked_fill(~given, 0.0)
    centred = (centred - centred.sum(-1, keepdim=True) / number.clamp_min(1)).masked_fill(~given, 0.0)
    variance = centred.square().sum(-1, keepdim=True) / (number - 1).clamp_min(1)
    # Clamped under the root: the root's slope at 0 is infinite.
    scaled = centred / variance.clamp_min(1e-14).sqrt()
    return scaled.masked_fill(~given, -math.inf)


def count_of(rows: Tensor) -> Tensor:
    """Number of examples in a batch, on its device."""
    return torch.tensor(len(rows), device=rows.device)
