"""Objectives that keep a model from being too sure: focal loss and confidence penalty."""

import torch
import torch.nn.functional as F
from torch import Tensor

from distill.objectives.answers import (
    LOG_ZERO,
    answer_logits,
    check_choice,
    check_positive,
    count_of,
    hard_labels,
    log_probabilities,
)
from distill.objectives.base import Loss, Objective, labelled_rows, zero_like
from distill.signal import Signal

LINKS = ("softmax", "sigmoid")


class Focal(Objective):
    """Focal loss on labels (Lin et al. ICCV 2017, eq. 4): cross-entropy that counts easy examples less.

    `-(1 - p_y)^gamma log p_y` with the softmax. With `link="sigmoid"`, summed over answers, `|y - p|^gamma` times the
    binary cross-entropy: eq. 4 where y is 0 or 1, and for soft VQA scores its extension by Li et al. (NeurIPS 2020,
    quality focal loss), which is zero at p = y. Models trained with it are better calibrated (Mukhoti et al. 2020).
    There is no canonical paper of "focal-calibrated distillation": here it is this loss on the labels beside `logits`
    from a calibrated teacher, one trained with `focal` or with `entropy`.

    Args:
        gamma: 0 is cross-entropy.
        link: `softmax`, for one right answer, or `sigmoid`, for soft scores also.
        weight: factor of this term.
    """

    kind = "focal"
    source = "Lin et al. 2017, eq. 4; soft scores: Li et al. 2020"
    student_needs = frozenset({"logits"})

    def __init__(self, *, gamma: float = 2.0, link: str = "softmax", weight: float = 1.0) -> None:
        super().__init__(weight=weight)
        check_positive(self, "gamma", gamma, zero=True)
        check_choice(self, "link", link, LINKS)
        self.gamma = gamma
        self.link = link

    def count(self, labels: Tensor | None, examples: int) -> int:
        """Count the labelled examples."""
        return 0 if labels is None else int(labelled_rows(labels).sum())

    def forward(self, student: Signal, teacher: Signal | None, labels: Tensor | None = None) -> Loss:
        """Compare `logits` `[b, n_answers]` with labels `[b]` or, with the sigmoid, soft scores `[b, n_answers]`."""
        logits = answer_logits(self, student, "student")
        if self.link == "sigmoid" and labels is not None and labels.dim() == 2:
            rows = labelled_rows(labels)
            scores = labels.to(logits)
        else:
            labels, rows = hard_labels(self, labels, "use link: sigmoid")
            scores = F.one_hot(labels.clamp_min(0), logits.shape[-1]).to(logits)
        if not rows.any():
            return zero_like(logits), rows.sum()
        focal = self._sigmoid if self.link == "sigmoid" else self._softmax
        return focal(logits[rows], scores[rows]).sum(), rows.sum()

    def _softmax(self, logits: Tensor, scores: Tensor) -> Tensor:
        log_p = (log_probabilities(logits) * scores).sum(-1)
        return -self._power(-torch.expm1(log_p)) * log_p

    def _sigmoid(self, logits: Tensor, scores: Tensor) -> Tensor:
        logits = logits.clamp_min(LOG_ZERO)  # 0 * -inf would be NaN
        cross = F.binary_cross_entropy_with_logits(logits, scores, reduction="none")
        return (self._power((scores - logits.sigmoid()).abs()) * cross).sum(-1)

    def _power(self, distance: Tensor) -> Tensor:
        # The slope of a power below 1 is infinite at 0, where a model is certain and right.
        return distance.clamp_min(torch.finfo(distance.dtype).eps) ** self.gamma


class Entropy(Objective):
    """Confidence penalty (Pereyra et al. 2017, section 3; DoKTra, Choi et al. 2022): minus the answers' entropy H(p).

    With weight beta beside `labels` the loss is `CE - beta H(p)`. The value is negative: at least `-log n_answers`, for
    even odds, and 0 for certainty. Every example counts, labelled or not. DoKTra's authors use beta from 0.3 to 0.5.

    Args:
        weight: beta.
    """

    kind = "entropy"
    source = "Pereyra et al. 2017, section 3; DoKTra (Choi et al. 2022)"
    student_needs = frozenset({"logits"})

    def forward(self, student: Signal, teacher: Signal | None, labels: Tensor | None = None) -> Loss:
        """Penalise `logits` `[b, n_answers]` of the student; neither teacher nor labels play a part."""
        log_p = log_probabilities(answer_logits(self, student, "student"))
        return (log_p.exp() * log_p).sum(), count_of(log_p)
