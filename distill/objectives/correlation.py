"""Correlation instead of divergence: which answers a model prefers matters, their exact probabilities do not."""

import torch
import torch.nn.functional as F
from torch import Tensor

from distill.objectives.answers import answer_logits, check_positive, check_same_answers
from distill.objectives.base import Loss, Objective
from distill.signal import Signal


class Dist(Objective):
    """One minus Pearson's correlation of answer probabilities, `softmax(z / T)` (DIST, Huang et al. 2022, section 4).

    `T^2 (inter * (1 - r_rows) + intra * (1 - r_columns))`: over the answers of each example, and over the examples of
    the micro-batch for each answer, each averaged. The second relation is weighted by examples where several
    micro-batches make a step, and left out where a micro-batch holds one example. An answer whose probability is
    the same for all examples has no correlation and counts 1.

    Args:
        inter: factor of the relation among answers.
        intra: factor of the relation among examples.
        temperature: T.
        weight: factor of this term.
    """

    kind = "dist"
    source = "DIST (Huang et al. 2022), section 4"
    student_needs = frozenset({"logits"})
    teacher_needs = frozenset({"logits"})

    def __init__(
        self, *, inter: float = 1.0, intra: float = 1.0, temperature: float = 1.0, weight: float = 1.0
    ) -> None:
        super().__init__(weight=weight)
        check_positive(self, "inter", inter, zero=True)
        check_positive(self, "intra", intra, zero=True)
        check_positive(self, "temperature", temperature)
        self.inter, self.intra, self.temperature = inter, intra, temperature

    def forward(self, student: Signal, teacher: Signal | None, labels: Tensor | None = None) -> Loss:
        """Compare `logits` `[b, n_answers]` of both sides; labels play no part."""
        z_s, z_t = answer_logits(self, student, "student"), answer_logits(self, teacher, "teacher").detach()
        check_same_answers(self, z_s, z_t)
        p_s, p_t = (z_s / self.temperature).softmax(-1), (z_t / self.temperature).softmax(-1)
        loss = self.inter * (1 - _correlation(p_s, p_t)).sum()
        if len(p_s) > 1:
            loss = loss + self.intra * (1 - _correlation(p_s.T, p_t.T)).mean() * len(p_s)
        return self.temperature**2 * loss, torch.tensor(len(p_s), device=z_s.device)


def _correlation(one: Tensor, other: Tensor) -> Tensor:
    """Pearson's correlation of each row of `[n, c]`."""
    return F.cosine_similarity(one - one.mean(1, keepdim=True), other - other.mean(1, keepdim=True), dim=1)
