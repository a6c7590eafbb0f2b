"""The student's states regressed on the teacher's."""

import torch
import torch.nn.functional as F
from torch import Tensor

from distill.alignment import LayerMap
from distill.objectives.answers import check_choice
from distill.objectives.base import Loss, example_mean
from distill.objectives.states import AdaptedObjective, adapt
from distill.signal import Signal

DISTANCES = ("mse", "cosine", "normalised")


class Hidden(AdaptedObjective):
    """Distance of a linear regression of the student's states from the teacher's (FitNets, Romero et al. 2015, eq. 3),
    at the words that both tokenizers share.

    Args:
        states: see `StateObjective`.
        layers: layer map for `hidden` and `cls`.
        distance: `mse`, the mean of squared differences; `cosine`, one minus the cosine; `normalised`, the mean of
            squared differences of the vectors scaled to length one.
        weight: factor of this term.
    """

    kind = "hidden"
    source = "FitNets (Romero et al. 2015), eq. 3"

    def __init__(
        self, *, states: str = "hidden", layers: LayerMap = "last", distance: str = "mse", weight: float = 1.0
    ) -> None:
        super().__init__(states=states, layers=layers, weight=weight)
        check_choice(self, "distance", distance, DISTANCES)
        self.distance = distance

    def forward(self, student: Signal, teacher: Signal | None, labels: Tensor | None = None) -> Loss:
        """Compare states; both signals need a text layout unless their states have the same token count."""
        self.prepare(student, teacher)
        losses = []
        for adapter, (s, t, exists) in zip(self.adapters, self.aligned(student, teacher), strict=True):
            losses.append(example_mean(self._distances(adapt(adapter, s), t), exists))
        return torch.stack([loss for loss, _ in losses]).mean(), torch.stack([count for _, count in losses]).amax()

    def _distances(self, s: Tensor, t: Tensor) -> Tensor:
        """Compare `[b, u, d]` row by row."""
        if self.distance == "cosine":
            return 1 - F.cosine_similarity(s, t, dim=-1)
        if self.distance == "normalised":
            s, t = F.normalize(s, dim=-1), F.normalize(t, dim=-1)
        return (s - t).square().mean(-1)
