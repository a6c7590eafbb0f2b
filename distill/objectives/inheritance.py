"""Half of the student inherits the teacher's features, the other half explores others."""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from distill.alignment import LayerMap
from distill.errors import DistillError
from distill.objectives.answers import check_choice, check_positive
from distill.objectives.base import Loss, example_mean
from distill.objectives.states import AdaptedObjective, adapt
from distill.signal import Signal

FORMS = ("distance", "cosine")


class InheritanceExploration(AdaptedObjective):
    """The first half of the student's channels is brought to the teacher's features, the second half kept from them
    (IE-KD, Huang et al. 2021).

    `inheritance * d(g_I(s_I), t) + exploration * e(g_E(s_E), t)`, where `g` are linear maps that train along, `d` is
    the mean absolute difference of vectors scaled to length one (factor transfer, Kim et al. 2018) and `e` is
    `-d` or `|cos|`. With `-d` the value may be negative. The authors first train auto-encoders and compare their
    codes, the teacher's "factors"; here the teacher's state is its own factor, for one vector is as compact already.

    Args:
        states: see `StateObjective`.
        layers: layer map for `hidden` and `cls`.
        inheritance: factor of the first part.
        exploration: factor of the second part.
        explore: form of `e`: `distance` or `cosine`.
        weight: factor of this term.
    """

    kind = "internal_external"
    source = "IE-KD (Huang et al. 2021), inheritance and exploration losses"

    def __init__(
        self,
        *,
        states: str = "pooled",
        layers: LayerMap = "last",
        inheritance: float = 1.0,
        exploration: float = 1.0,
        explore: str = "distance",
        weight: float = 1.0,
    ) -> None:
        super().__init__(states=states, layers=layers, weight=weight)
        check_positive(self, "inheritance", inheritance, zero=True)
        check_positive(self, "exploration", exploration, zero=True)
        check_choice(self, "explore", explore, FORMS)
        self.inheritance, self.exploration, self.explore = inheritance, exploration, explore

    def adapter(self, student_width: int, teacher_width: int) -> nn.Module:
        """Make the two maps of one layer pair."""
        if student_width < 2:
            raise DistillError(f"objective {self.kind!r}: a state of width {student_width} cannot be split in two")
        return Halves(student_width, teacher_width)

    def forward(self, student: Signal, teacher: Signal | None, labels: Tensor | None = None) -> Loss:
        """Compare both halves with the teacher's states."""
        self.prepare(student, teacher)
        losses = []
        for adapter, (s, t, exists) in zip(self.adapters, self.aligned(student, teacher), strict=True):
            inherited, explored = (F.normalize(part, dim=-1) for part in adapt(adapter, s).chunk(2, dim=-1))
            factor = F.normalize(t, dim=-1)
            near = (inherited - factor).abs().mean(-1)
            far = (explored * factor).sum(-1).abs() if self.explore == "cosine" else -(explored - factor).abs().mean(-1)
            losses.append(example_mean(self.inheritance * near + self.exploration * far, exists))
        return torch.stack([loss for loss, _ in losses]).mean(), torch.stack([count for _, count in losses]).amax()


class Halves(nn.Module):
    """A linear map of each half of the student's channels to the teacher's width."""

    def __init__(self, inputs: int, outputs: int) -> None:
        super().__init__()
        self.split = inputs // 2
        self.inherited = nn.Linear(self.split, outputs)
        self.explored = nn.Linear(inputs - self.split, outputs)

    def forward(self, states: Tensor) -> Tensor:
        """Map `[..., inputs]` to `[..., 2 * outputs]`: what is inherited, then what is explored."""
        first, second = states[..., : self.split], states[..., self.split :]
        return torch.cat([self.inherited(first), self.explored(second)], dim=-1)
