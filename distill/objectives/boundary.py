"""Activation boundaries: on which side of zero each unit of the teacher is."""

import torch
from torch import Tensor, nn

from distill.alignment import LayerMap
from distill.objectives.answers import check_choice, check_positive
from distill.objectives.base import Loss, example_mean
from distill.objectives.states import AdaptedObjective, adapt, single_precision
from distill.signal import Signal

PROJECTIONS = ("frozen", "trained")


class ActivationBoundary(AdaptedObjective):
    """Squared hinge that brings each unit of the student to the teacher's side of zero (Heo et al. 2019), as
    DoKTra (Choi et al. 2022) applies it to the last [CLS] state.

    `sum_d [(s + m)^2 1(s > -m, t <= 0) + (s - m)^2 1(s <= m, t > 0)] / 1000` with the margin `m`, averaged over
    examples. DoKTra's code divides by the nominal batch size, so that a short last batch counts less; here every
    example counts alike. A unit of the student that is at least `m` on the right side costs nothing.

    Args:
        states: see `StateObjective`; `cls` with the last layer is DoKTra's choice.
        layers: layer map for `hidden` and `cls`.
        margin: m.
        projection: where the widths differ, `frozen` sends the teacher's states through a random linear map that is
            never trained (DoKTra: Xavier weights, bias 0.01), so the boundaries are those of random projections. With
            `trained` a linear regression of the student's states is compared with the teacher's, at equal widths too.
        weight: factor of this term.
    """

    kind = "activation_boundary"
    source = "Heo et al. 2019, alternative loss; DoKTra (Choi et al. 2022)"

    def __init__(
        self,
        *,
        states: str = "pooled",
        layers: LayerMap = "last",
        margin: float = 1.0,
        projection: str = "frozen",
        weight: float = 1.0,
    ) -> None:
        super().__init__(states=states, layers=layers, weight=weight)
        check_positive(self, "margin", margin)
        check_choice(self, "projection", projection, PROJECTIONS)
        self.margin, self.projection = margin, projection

    def adapter(self, student_width: int, teacher_width: int) -> nn.Module:
        """Make the student's regressor or the teacher's frozen projection; none for equal widths."""
        if self.projection == "trained":
            return nn.Linear(student_width, teacher_width)
        return nn.Identity() if student_width == teacher_width else FrozenProjection(teacher_width, student_width)

    def forward(self, student: Signal, teacher: Signal | None, labels: Tensor | None = None) -> Loss:
        """Compare the sides of zero."""
        self.prepare(student, teacher)
        losses = []
        for adapter, (s, t, exists) in zip(self.adapters, self.aligned(student, teacher), strict=True):
            s, t = (adapt(adapter, s), t) if self.projection == "trained" else (s, adapt(adapter, t))
            hinge = torch.where(t > 0, self.margin - s, self.margin + s).clamp_min(0)
            losses.append(example_mean(hinge.square().sum(-1) / 1000, exists))
        return torch.stack([loss for loss, _ in losses]).mean(), torch.stack([count for _, count in losses]).amax()


class FrozenProjection(nn.Module):
    """A random linear map that no optimiser sees; kept in checkpoints, so that resuming meets the same boundaries."""

    weight: Tensor
    bias: Tensor

    def __init__(self, inputs: int, outputs: int) -> None:
        super().__init__()
        self.register_buffer("weight", nn.init.xavier_uniform_(torch.empty(outputs, inputs)))
        self.register_buffer("bias", torch.full((outputs,), 0.01))

    def forward(self, states: Tensor) -> Tensor:
        """Map `[..., inputs]` to `[..., outputs]`."""
        with single_precision(states):
            return nn.functional.linear(states, self.weight.to(states), self.bias.to(states))
