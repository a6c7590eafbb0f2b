"""Teachers that are no larger model: a peer that trains along, an older self."""

from collections.abc import Sequence

import torch
from torch import Tensor

from distill.errors import DistillError
from distill.objectives.answers import answer_logits, check_positive, check_same_answers
from distill.objectives.base import Loss, Objective
from distill.objectives.response import softmax_kl
from distill.signal import Signal


class Mutual(Objective):
    """Divergence from a peer that is trained at the same time (DML, Zhang et al. 2018, section 3.2).

    `KL(peer || own)` at temperature 1. The peer stands in the teacher's place and gets no gradient; its own loss is the
    mirror image.

    Args:
        weight: factor of this term.
    """

    kind = "mutual"
    source = "DML (Zhang et al. 2018), section 3.2"
    student_needs = frozenset({"logits"})
    teacher_needs = frozenset({"logits"})

    def forward(self, student: Signal, teacher: Signal | None, labels: Tensor | None = None) -> Loss:
        """Compare `logits` `[b, n_answers]` with the peer's; labels play no part."""
        own, peer = answer_logits(self, student, "student"), answer_logits(self, teacher, "teacher").detach()
        check_same_answers(self, own, peer)
        return softmax_kl(peer, own, 1.0).sum(), torch.tensor(len(own), device=own.device)


class Continual(Objective):
    """Learning without forgetting (Li and Hoiem 2016, eq. 2): the old model teaches the answers that it knows, while
    other terms teach the new ones.

    `KL(softmax(z_old / T) || softmax(z / T))` over the old answers alone, without a factor `T^2`, as in the paper,
    whose cross-entropy differs by the old model's entropy. What probability the student gives to new answers does not
    matter.

    Args:
        temperature: T.
        answers: the student's column of each of the old model's answers, counted from 0; null finds them by name.
        weight: factor of this term.
    """

    kind = "continual"
    source = "learning without forgetting (Li and Hoiem 2016), eq. 2"
    student_needs = frozenset({"logits"})
    teacher_needs = frozenset({"logits"})

    def __init__(self, *, temperature: float = 2.0, answers: Sequence[int] | None = None, weight: float = 1.0) -> None:
        super().__init__(weight=weight)
        check_positive(self, "temperature", temperature)
        if answers is not None and (not answers or len(set(answers)) < len(answers) or min(answers) < 0):
            raise DistillError(
                f"objective {self.kind!r}: answers is {list(answers)}; give the student's column of each of the old "
                "model's answers, each column once"
            )
        self.temperature = temperature
        self.answers = None if answers is None else list(answers)
        self.columns = self.answers

    def match(self, student: Sequence[str], teacher: Sequence[str] | None) -> None:
        """Find the old answers among the student's, by name unless the setting says where they are."""
        if self.answers is not None:
            if max(self.answers) >= len(student) or (teacher is not None and len(teacher) != len(self.answers)):
                old = "an unknown number of" if teacher is None else len(teacher)
                raise DistillError(
                    f"objective {self.kind!r}: answers names {len(self.answers)} columns up to {max(self.answers)}; "
                    f"the old model has {old} answers and the student {len(student)}"
                )
            return
        if teacher is None:
            raise DistillError(
                f"objective {self.kind!r}: the teacher does not say what it answers over; give answers, the student's "
                "column of each of its answers"
            )
        place = {answer: i for i, answer in enumerate(student)}
        lost = [answer for answer in teacher if answer not in place]
        if lost:
            raise DistillError(
                f"objective {self.kind!r}: the student does not know {', '.join(map(repr, lost[:5]))}; its vocabulary "
                "must hold every old answer"
            )
        self.columns = [place[answer] for answer in teacher]

    def forward(self, student: Signal, teacher: Signal | None, labels: Tensor | None = None) -> Loss:
        """Compare the student's `logits` `[b, n_answers]` with the old model's `[b, n_old]`; labels play no part."""
        z_s, z_t = answer_logits(self, student, "student"), answer_logits(self, teacher, "teacher").detach()
        if self.columns is None:
            raise DistillError(f"objective {self.kind!r}: call match with both vocabularies first, or give answers")
        if max(self.columns) >= z_s.shape[1] or len(self.columns) != z_t.shape[1]:
            raise DistillError(
                f"objective {self.kind!r}: {len(self.columns)} columns up to {max(self.columns)} do not fit the old "
                f"model's {z_t.shape[1]} answers and the student's {z_s.shape[1]}"
            )
        value = softmax_kl(z_t, z_s[:, self.columns], self.temperature) / self.temperature**2
        return value.sum(), torch.tensor(len(z_s), device=z_s.device)
