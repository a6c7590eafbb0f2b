"""Learning from a teacher that tells no more than its k most likely answers."""

import math

import torch
from torch import Tensor

from distill.errors import DistillError
from distill.objectives.answers import (
    LOG_ZERO,
    answer_logits,
    check_choice,
    check_same_answers,
    check_whole,
    count_of,
    kl,
    log_probabilities,
)
from distill.objectives.base import Loss, Objective
from distill.signal import Signal

TARGETS = ("logits", "top_logits")


class TopK(Objective):
    """`KL(teacher || student)` over the teacher's k likeliest answers and one bucket that holds all the others.

    The bucket carries `1 - sum of the k probabilities` on either side, so what the teacher did not tell is neither
    spread over the other answers (TinyViT, Wu et al. 2022) nor lost. It is the forward KL of two coarsened
    distributions, hence at most that of `logits` at temperature 1, and equal to it when k is the number of answers.
    There is no temperature: the tail's share at another one is not known.

    Args:
        k: number of answers; fewer where the teacher gives fewer.
        targets: `logits` takes the k largest of a teacher that gives all, `top_logits` what it gives.
        weight: factor of this term.
    """

    kind = "top_k"
    source = "truncated targets as in TinyViT (Wu et al. 2022); tail bucket our own"
    student_needs = frozenset({"logits"})

    def __init__(self, *, k: int = 10, targets: str = "logits", weight: float = 1.0) -> None:
        super().__init__(weight=weight)
        check_whole(self, "k", k, least=1)
        check_choice(self, "targets", targets, TARGETS)
        self.k = k
        self.targets = targets
        self.teacher_needs = frozenset({targets})

    def forward(self, student: Signal, teacher: Signal | None, labels: Tensor | None = None) -> Loss:
        """Compare the student's `logits` `[b, n_answers]` with the targets; labels play no part."""
        log_s = log_probabilities(answer_logits(self, student, "student"))
        values, indices = self._top(teacher, log_s)
        given = values > -math.inf  # False where the teacher told fewer than k
        told = torch.zeros_like(log_s).scatter_add(1, indices, given.to(log_s)) > 0
        tail_s = log_s.masked_fill(told, 2 * LOG_ZERO).logsumexp(-1, keepdim=True).clamp_min(LOG_ZERO)
        rest = 1 - values.exp().sum(-1, keepdim=True)
        # What rounding leaves of a full distribution is no tail.
        tail_t = torch.where(rest > 1e-6, rest.clamp_min(1e-6).log(), LOG_ZERO)
        log_t = torch.cat([values.masked_fill(~given, LOG_ZERO), tail_t], dim=-1)
        return kl(log_t, torch.cat([log_s.gather(1, indices), tail_s], dim=-1)).sum(), count_of(log_s)

    def _top(self, teacher: Signal | None, student: Tensor) -> tuple[Tensor, Tensor]:
        """Return the log-probabilities and indices `[b, k]` of the answers that count."""
        if self.targets == "logits":
            logits = answer_logits(self, teacher, "teacher").detach()
            check_same_answers(self, student, logits)
            top = logits.log_softmax(-1).topk(min(self.k, logits.shape[-1]))
            return top.values, top.indices
        given = self.take(teacher, "teacher", "top_logits")
        assert isinstance(given, tuple)
        values, indices = given[0].detach().float(), given[1]
        if len(values) != len(student) or values.shape != indices.shape or int(indices.max()) >= student.shape[-1]:
            raise DistillError(
                f"objective {self.kind!r}: top_logits of shape {tuple(values.shape)} with answers up to number "
                f"{int(indices.max())} do not fit the student's logits {tuple(student.shape)}"
            )
        top = values.topk(min(self.k, values.shape[-1]))
        return top.values, indices.gather(1, top.indices)
