"""Decoupled knowledge distillation."""

import torch
from torch import Tensor

from distill.errors import DistillError
from distill.objectives.answers import (
    LOG_ZERO,
    answer_logits,
    check_positive,
    check_same_answers,
    hard_labels,
    kl,
    log_probabilities,
)
from distill.objectives.base import Loss, Objective, labelled_rows, zero_like
from distill.signal import Signal


class DecoupledKD(Objective):
    """Decoupled knowledge distillation (DKD, Zhao et al. CVPR 2022, eq. 7).

    `T^2 [alpha KL(b_t || b_s) + beta KL(q_t || q_s)]`: b = (p_y, 1 - p_y) says how sure a model is of the right answer
    y, q is its distribution over the wrong ones. With alpha = 1 and beta = 1 - p_y of the teacher it would be `logits`.
    It is defined where one answer is right; at fewer than three answers q has one entry and its term is always zero.
    The authors' warm-up is left to the weight.

    Args:
        alpha: factor of the term on the right answer.
        beta: factor of the term on the wrong ones; the authors use 0.5 to 8, more for surer teachers.
        temperature: T.
        weight: factor of this term.
    """

    kind = "dkd"
    source = "DKD (Zhao et al. 2022), eq. 7"
    student_needs = frozenset({"logits"})
    teacher_needs = frozenset({"logits"})

    def __init__(self, *, alpha: float = 1.0, beta: float = 8.0, temperature: float = 4.0, weight: float = 1.0) -> None:
        super().__init__(weight=weight)
        check_positive(self, "alpha", alpha, zero=True)
        check_positive(self, "beta", beta, zero=True)
        check_positive(self, "temperature", temperature)
        self.alpha, self.beta, self.temperature = alpha, beta, temperature

    def count(self, labels: Tensor | None, examples: int) -> int:
        """Count the labelled examples."""
        return 0 if labels is None else int(labelled_rows(labels).sum())

    def forward(self, student: Signal, teacher: Signal | None, labels: Tensor | None = None) -> Loss:
        """Compare `logits` `[b, n_answers]` of both sides, given labels `[b]`."""
        z_s, z_t = answer_logits(self, student, "student"), answer_logits(self, teacher, "teacher").detach()
        check_same_answers(self, z_s, z_t)
        labels, rows = hard_labels(self, labels, "use 'logits', 'jsd' or another objective without labels")
        if z_s.shape[-1] < 3:
            raise DistillError(
                f"objective {self.kind!r} needs at least 3 answers, for with {z_s.shape[-1]} there is no choice among "
                "wrong ones to learn from; use 'logits'"
            )
        if not rows.any():
            return zero_like(z_s), rows.sum()
        right_t, wrong_t = self._decouple(z_t[rows], labels[rows])
        right_s, wrong_s = self._decouple(z_s[rows], labels[rows])
        loss = self.alpha * kl(right_t, right_s) + self.beta * kl(wrong_t, wrong_s)
        return self.temperature**2 * loss.sum(), rows.sum()

    def _decouple(self, logits: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
        """Return log-probabilities `[b, 2]` of right and wrong, and `[b, n_answers - 1]` among the wrong answers."""
        log_p = log_probabilities(logits / self.temperature)
        others = torch.ones_like(log_p, dtype=torch.bool).scatter(1, labels[:, None], False)
        wrong = log_p[others].view(len(log_p), -1)
        total = wrong.logsumexp(-1, keepdim=True)
        right = torch.cat([log_p.gather(1, labels[:, None]), total.clamp_min(LOG_ZERO)], dim=-1)
        return right, (wrong - total).clamp_min(LOG_ZERO)
