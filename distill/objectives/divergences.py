"""Divergences between two answer distributions, beside the forward KL of `logits`."""

import math

import torch
from torch import Tensor

from distill.errors import DistillError
from distill.objectives.answers import (
    NORMALISE,
    answer_logits,
    check_choice,
    check_positive,
    check_same_answers,
    count_of,
    kl,
    log_probabilities,
    z_score,
)
from distill.objectives.base import Loss, Objective
from distill.signal import Signal


class AnswerObjective(Objective):
    """A comparison of two rows of answer logits per example.

    Args:
        normalise: `none`, or `z_score`, which brings every row of logits to mean 0 and standard deviation 1 before the
            temperature (logit standardisation, Sun et al. CVPR 2024, algorithm 1): the student then matches the
            teacher's order and relative margins, not its scale.
        weight: factor of this term.
    """

    student_needs = frozenset({"logits"})
    teacher_needs = frozenset({"logits"})
    temperature = 1.0

    def __init__(self, *, normalise: str = "none", weight: float = 1.0) -> None:
        super().__init__(weight=weight)
        check_choice(self, "normalise", normalise, NORMALISE)
        self.normalise = normalise

    def forward(self, student: Signal, teacher: Signal | None, labels: Tensor | None = None) -> Loss:
        """Compare `logits` `[b, n_answers]` of both sides; labels play no part."""
        z_s, z_t = answer_logits(self, student, "student"), answer_logits(self, teacher, "teacher").detach()
        check_same_answers(self, z_s, z_t)
        if self.normalise == "z_score":
            z_s, z_t = z_score(z_s), z_score(z_t)
        return self.compare(z_t / self.temperature, z_s / self.temperature).sum(), count_of(z_s)

    def compare(self, teacher: Tensor, student: Tensor) -> Tensor:
        """Return one value `[b]` per row of `[b, n_answers]` logits, normalised and divided by T."""
        raise NotImplementedError


class AnswerDivergence(AnswerObjective):
    """A divergence of two answer distributions at a temperature.

    Args:
        temperature: T; logits are divided by it.
        normalise: see `AnswerObjective`.
        weight: factor of this term.
    """

    def __init__(self, *, temperature: float = 1.0, normalise: str = "none", weight: float = 1.0) -> None:
        super().__init__(normalise=normalise, weight=weight)
        check_positive(self, "temperature", temperature)
        self.temperature = temperature


class JensenShannon(AnswerDivergence):
    """Generalised Jensen-Shannon divergence (GKD, Agarwal et al. ICLR 2024, section 2).

    `T^2 [beta KL(p_t || m) + (1 - beta) KL(p_s || m)]` with `m = beta p_t + (1 - beta) p_s`. It is bounded, so answers
    that one side excludes cost a finite amount. As beta goes to 0 or 1 it vanishes, while its ratio to beta or 1 - beta
    goes to the forward or the reverse KL; beta = 0 and beta = 1 stand for these two limits, as is usual. The paper has
    no factor T^2; it keeps the gradient's size, as in `logits`.

    Args:
        beta: from 0, the forward `KL(p_t || p_s)`, to 1, the reverse `KL(p_s || p_t)`.
        temperature: T.
        normalise: see `AnswerObjective`; `beta: 0.0, normalise: z_score` is the loss of Sun et al. (2024).
        weight: factor of this term.
    """

    kind = "jsd"
    source = "GKD (Agarwal et al. 2024), section 2"

    def __init__(
        self, *, beta: float = 0.5, temperature: float = 1.0, normalise: str = "none", weight: float = 1.0
    ) -> None:
        super().__init__(temperature=temperature, normalise=normalise, weight=weight)
        if not 0 <= beta <= 1:
            raise DistillError(f"objective {self.kind!r}: beta is {beta}, it must lie between 0 and 1")
        self.beta = beta

    def compare(self, teacher: Tensor, student: Tensor) -> Tensor:
        """See the class."""
        log_t, log_s = log_probabilities(teacher), log_probabilities(student)
        if self.beta == 0:
            return self.temperature**2 * kl(log_t, log_s)
        if self.beta == 1:
            return self.temperature**2 * kl(log_s, log_t)
        log_m = torch.logaddexp(log_t + math.log(self.beta), log_s + math.log1p(-self.beta))
        return self.temperature**2 * (self.beta * kl(log_t, log_m) + (1 - self.beta) * kl(log_s, log_m))


class ReverseKL(AnswerDivergence):
    """Reverse divergence `T^2 KL(p_s || p_t)` (MiniLLM, Gu et al. ICLR 2024, eq. 1).

    The student keeps to answers that the teacher finds likely, and need not cover all of them.
    """

    kind = "reverse_kl"
    source = "MiniLLM (Gu et al. 2024), eq. 1"

    def compare(self, teacher: Tensor, student: Tensor) -> Tensor:
        """See the class."""
        return self.temperature**2 * kl(log_probabilities(student), log_probabilities(teacher))


class SymmetricKL(AnswerDivergence):
    """Mean of both directions: half of the divergence J of Kullback and Leibler (1951, section 3).

    `T^2 [KL(p_t || p_s) + KL(p_s || p_t)] / 2`.
    """

    kind = "symmetric_kl"
    source = "Kullback and Leibler 1951, section 3"

    def compare(self, teacher: Tensor, student: Tensor) -> Tensor:
        """See the class."""
        log_t, log_s = log_probabilities(teacher), log_probabilities(student)
        return self.temperature**2 * (kl(log_t, log_s) + kl(log_s, log_t)) / 2


class TotalVariation(AnswerDivergence):
    """Total variation distance `T * sum |p_t - p_s| / 2` (f-DISTILL, Wen et al. ACL 2023, section 3).

    It grows with the first power of the difference, so one factor T is enough to keep the gradient's size.
    """

    kind = "tvd"
    source = "f-DISTILL (Wen et al. 2023), section 3"

    def compare(self, teacher: Tensor, student: Tensor) -> Tensor:
        """See the class."""
        return self.temperature * (teacher.softmax(-1) - student.softmax(-1)).abs().sum(-1) / 2


class LogitMSE(AnswerObjective):
    """Squared error of logits, averaged over the answers that neither side excludes (Kim et al. IJCAI 2021).

    Unlike every softmax it also sees a shift that all answers share; `normalise: z_score` takes shift and scale out.
    """

    kind = "logit_mse"
    source = "Kim et al. 2021"

    def compare(self, teacher: Tensor, student: Tensor) -> Tensor:
        """See the class."""
        given = (teacher > -math.inf) & (student > -math.inf)
        error = (student - teacher).masked_fill(~given, 0.0).square().sum(-1)
        return error / given.sum(-1).clamp_min(1)
