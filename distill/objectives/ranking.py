"""Learning the teacher's order of answers, or of candidates in retrieval, and not its scores."""

import torch.nn.functional as F
from torch import Tensor

from distill.errors import DistillError
from distill.objectives.answers import (
    LOG_ZERO,
    answer_logits,
    check_choice,
    check_positive,
    check_same_answers,
    check_whole,
    count_of,
    kl,
)
from distill.objectives.base import Loss, Objective
from distill.signal import Signal

METHODS = ("pairwise", "listnet", "listmle")
SCORES = ("logits", "similarity")


class Ranking(Objective):
    """Distillation of a ranking: the student orders the teacher's k best candidates as the teacher does.

    - `pairwise`: logistic loss `log(1 + exp(-(s_i - s_j)))`, averaged over the pairs that the teacher puts in the order
      i before j (RankNet, Burges et al. ICML 2005, eq. 3, with target 1). Ties make no pair. It falls towards zero as
      margins grow, also beyond the teacher's.
    - `listnet`: `T^2 KL` of the softmax over these candidates alone (ListNet's top-one loss, Cao et al. ICML 2007, less
      the teacher's entropy, so that it is zero at the teacher).
    - `listmle`: minus the Plackett-Luce log-likelihood of the teacher's first k places, divided by k (ListMLE, Xia et
      al. ICML 2008, cut at k): every place is a choice among all candidates that are left.

    Args:
        method: `pairwise`, `listnet` or `listmle`.
        scores: `logits` ranks the answers of each example; `similarity` ranks the texts of each picture and the
            pictures of each text within the batch, the mean of both.
        top_k: how many of the teacher's best candidates count; all where there are fewer.
        temperature: T of `listnet`; the others know none.
        weight: factor of this term.
    """

    kind = "ranking"
    source = "RankNet (Burges et al. 2005), ListNet (Cao et al. 2007), ListMLE (Xia et al. 2008)"

    def __init__(
        self,
        *,
        method: str = "pairwise",
        scores: str = "logits",
        top_k: int = 10,
        temperature: float = 1.0,
        weight: float = 1.0,
    ) -> None:
        super().__init__(weight=weight)
        check_choice(self, "method", method, METHODS)
        check_choice(self, "scores", scores, SCORES)
        check_whole(self, "top_k", top_k, least=2)
        check_positive(self, "temperature", temperature)
        if temperature != 1 and method != "listnet":
            raise DistillError(f"objective {self.kind!r}: temperature {temperature} means nothing to method {method!r}")
        self.method, self.scores, self.top_k, self.temperature = method, scores, top_k, temperature
        self.student_needs = self.teacher_needs = frozenset({scores})

    def forward(self, student: Signal, teacher: Signal | None, labels: Tensor | None = None) -> Loss:
        """Compare `logits` `[b, n_answers]` or `similarity` `[b, b]` of both sides; labels play no part."""
        s, t = self._scores(student, "student"), self._scores(teacher, "teacher").detach()
        check_same_answers(self, s, t, self.scores)
        loss = self._rows(s, t)
        if self.scores == "similarity":
            loss = (loss + self._rows(s.T, t.T)) / 2
        return loss.sum(), count_of(s)

    def _scores(self, signal: Signal | None, side: str) -> Tensor:
        if self.scores == "logits":
            scores = answer_logits(self, signal, side)
        else:
            taken = self.take(signal, side, "similarity")
            assert isinstance(taken, Tensor)
            scores = taken.float()
        return scores.clamp_min(LOG_ZERO)  # differences of -inf would be NaN

    def _rows(self, student: Tensor, teacher: Tensor) -> Tensor:
        """Return one value per row of `[b, n]` scores."""
        order = teacher.argsort(dim=-1, descending=True, stable=True)
        s, t = student.gather(-1, order), teacher.gather(-1, order)
        k = min(self.top_k, s.shape[-1])
        if self.method == "listmle":
            left = s.flip(-1).logcumsumexp(-1).flip(-1)
            return (left - s)[:, :k].mean(-1)
        s, t = s[:, :k], t[:, :k]
        if self.method == "listnet":
            log_t, log_s = (F.log_softmax(z / self.temperature, dim=-1) for z in (t, s))
            return self.temperature**2 * kl(log_t, log_s)
        ordered = (t[:, :, None] > t[:, None, :]).to(s)
        pairs = F.softplus(s[:, None, :] - s[:, :, None]) * ordered
        return pairs.sum((1, 2)) / ordered.sum((1, 2)).clamp_min(1)
