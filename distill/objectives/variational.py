"""Variational information distillation: how well the student's states predict the teacher's."""

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from distill.alignment import LayerMap
from distill.objectives.base import Loss, example_mean
from distill.objectives.states import AdaptedObjective, adapt
from distill.signal import Signal

FLOOR = 1e-5
"""Smallest variance, as in the authors' code."""

FIRST = 5.0
"""Variance that training starts from, as in the authors' code."""


class Variational(AdaptedObjective):
    """Negative log-likelihood of the teacher's states under a Gaussian around a linear regression of the student's
    (VID, Ahn et al. 2019, section 2), less the constant `log(2 pi) / 2`.

    `[(mu(s) - t)^2 / v + log v] / 2`, the mean over units, with one variance `v = softplus(a) + 1e-5` per unit of the
    teacher, trained along. So it may fall below zero; for given variances its minimum is `mean(log v) / 2`, at
    `mu(s) = t`.

    Args:
        states: see `StateObjective`.
        layers: layer map for `hidden` and `cls`.
        weight: factor of this term.
    """

    kind = "vid"
    source = "VID (Ahn et al. 2019), section 2"

    def __init__(self, *, states: str = "pooled", layers: LayerMap = "last", weight: float = 1.0) -> None:
        super().__init__(states=states, layers=layers, weight=weight)

    def adapter(self, student_width: int, teacher_width: int) -> nn.Module:
        """Make the Gaussian of one layer pair."""
        return Gaussian(student_width, teacher_width)

    def forward(self, student: Signal, teacher: Signal | None, labels: Tensor | None = None) -> Loss:
        """Score the teacher's states."""
        self.prepare(student, teacher)
        losses = []
        for gaussian, (s, t, exists) in zip(self.adapters, self.aligned(student, teacher), strict=True):
            mean, variance = adapt(gaussian, s).chunk(2, dim=-1)
            unlikely = ((mean - t).square() / variance + variance.log()) / 2
            losses.append(example_mean(unlikely.mean(-1), exists))
        return torch.stack([loss for loss, _ in losses]).mean(), torch.stack([count for _, count in losses]).amax()


class Gaussian(nn.Module):
    """Mean and variance of the teacher's states, given the student's."""

    def __init__(self, inputs: int, outputs: int) -> None:
        super().__init__()
        self.mean = nn.Linear(inputs, outputs)
        self.raw_variance = nn.Parameter(torch.full((outputs,), math.log(math.expm1(FIRST - FLOOR))))

    def forward(self, states: Tensor) -> Tensor:
        """Map `[..., inputs]` to `[..., 2 * outputs]`: means, then variances."""
        mean = self.mean(states).float()
        variance = F.softplus(self.raw_variance.float()) + FLOOR
        return torch.cat([mean, variance.expand_as(mean)], dim=-1)
