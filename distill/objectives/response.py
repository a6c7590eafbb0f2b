"""Objectives on what a model answers: its task's labels, a teacher's logits, a teacher's similarities."""

import torch
import torch.nn.functional as F
from torch import Tensor

from distill.errors import DistillError
from distill.objectives.answers import check_choice, check_positive
from distill.objectives.base import Loss, Objective, count_words, labelled_rows, zero_like
from distill.signal import Request, Signal

LINKS = ("softmax", "sigmoid")


class Labels(Objective):
    """The task's own loss.

    Classification: cross-entropy of `logits`; soft VQA scores are scaled to a distribution (`link="softmax"`) or
    taken per answer by binary cross-entropy, summed over answers (`link="sigmoid"`, Teney et al. 2018).
    Captioning: cross-entropy of `word_logits`, averaged over words, not over captions.
    Retrieval: InfoNCE over `similarity`, the mean of both directions (CLIP, Radford et al. 2021, fig. 3), where every
    pair with the same label is a positive; plus, where the model has a matching head, binary cross-entropy over
    `matching` (ALBEF, Li et al. 2021, eq. 3).

    Args:
        link: `softmax` or `sigmoid`.
        weight: factor of this term.
    """

    kind = "labels"
    source = "cross-entropy / BCE; InfoNCE (Radford et al. 2021); matching (Li et al. 2021, eq. 3)"

    def __init__(self, *, link: str = "softmax", weight: float = 1.0) -> None:
        super().__init__(weight=weight)
        check_choice(self, "link", link, LINKS)
        self.link = link

    def missing(self, student: frozenset[str], teacher: frozenset[str]) -> dict[str, frozenset[str]]:
        """Any of the outputs that tasks have labels for will do."""
        lacking = frozenset() if student & {"logits", "word_logits", "similarity"} else frozenset({"logits"})
        return {"student": lacking, "teacher": frozenset()}

    def requests(self, student_depth: int, teacher_depth: int) -> tuple[Request, Request]:
        """Ask the student for every output that the task has labels for."""
        return Request(fields=frozenset({"logits", "similarity", "matching"})), Request(fields=frozenset())

    def count(self, labels: Tensor | None, examples: int) -> int:
        """Count the labelled examples, of captions the words."""
        words = count_words(labels)
        if words is not None:
            return words
        return examples if labels is None else int(labelled_rows(labels).sum())

    def forward(self, student: Signal, teacher: Signal | None, labels: Tensor | None = None) -> Loss:
        """See the class; `labels` may be None only for retrieval, where row i then belongs to column i."""
        if student.logits is None and student.similarity is not None:
            return self._contrast(student, labels)
        logits = self.take(student, "student", "logits") if student.word_logits is None else student.word_logits
        assert isinstance(logits, Tensor)
        if labels is None:
            raise DistillError("objective 'labels' was given no labels")
        if student.word_logits is not None:
            logits, labels = logits.flatten(0, 1), labels.flatten()
        rows = labelled_rows(labels)
        if not rows.any():
            return zero_like(logits), rows.sum()
        # Single precision: the sum over a batch and thousands of answers overflows fp16.
        return self._classify(logits[rows].float(), labels[rows]), rows.sum()

    def _classify(self, logits: Tensor, labels: Tensor) -> Tensor:
        if labels.dim() == 1 and self.link == "softmax":
            return F.cross_entropy(logits, labels, reduction="sum")
        scores = F.one_hot(labels, logits.shape[-1]).to(logits) if labels.dim() == 1 else labels.to(logits)
        if self.link == "sigmoid":
            return F.binary_cross_entropy_with_logits(logits, scores, reduction="sum")
        # An example whose answers are all outside the vocabulary has an all-zero row and adds nothing.
        target = scores / scores.sum(-1, keepdim=True).clamp_min(torch.finfo(scores.dtype).tiny)
        return -(target * F.log_softmax(logits, dim=-1)).sum()

    def _contrast(self, student: Signal, labels: Tensor | None) -> Loss:
        assert student.similarity is not None
        similarity, matching = student.similarity.float(), student.matching
        group = torch.arange(len(similarity), device=similarity.device) if labels is None else labels
        rows = labelled_rows(group)
        if not rows.any():
            unused = zero_like(similarity)
            return unused if matching is None else unused + zero_like(matching), rows.sum()
        target = (group[:, None] == group[None, :]).to(similarity)[rows]
        target = target / target.sum(-1, keepdim=True)
        loss = -(target * F.log_softmax(similarity, dim=1)[rows]).sum() / 2
        loss = loss - (target * F.log_softmax(similarity.T, dim=1)[rows]).sum() / 2
        if matching is not None:
            loss = loss + _matching_loss(matching[:, rows].float())
        return loss, rows.sum()


def _matching_loss(matching: Tensor) -> Tensor:
    """Binary cross-entropy of `[3, b]` matching logits, true pairs in the first row, averaged over the three."""
    target = torch.zeros_like(matching)
    target[0] = 1
    return F.binary_cross_entropy_with_logits(matching, target, reduction="none").mean(0).sum()


class Logits(Objective):
    """Divergence of the student's answer distribution from the teacher's (Hinton et al. 2015, eq. 4 and section 2.1).

    Between captioners it is taken word by word, given the caption's own words before it (word-level distillation;
    Kim & Rush 2016, section 3.1), and averaged over words.

    `T^2 * KL(softmax(z_t / T) || softmax(z_s / T))`, or with `link="sigmoid"` the sum over answers of the divergence
    between the two Bernoulli distributions: zero at the teacher, unlike plain BCE, with the same gradient.

    Args:
        temperature: T.
        link: `softmax` or `sigmoid`.
        weight: factor of this term.
    """

    kind = "logits"
    source = "Hinton et al. 2015, section 2.1"
    student_needs = frozenset({"logits"})
    teacher_needs = frozenset({"logits"})

    def __init__(self, *, temperature: float = 2.0, link: str = "softmax", weight: float = 1.0) -> None:
        super().__init__(weight=weight)
        check_positive(self, "temperature", temperature)
        check_choice(self, "link", link, LINKS)
        self.temperature = temperature
        self.link = link

    def missing(self, student: frozenset[str], teacher: frozenset[str]) -> dict[str, frozenset[str]]:
        """Return what both sides lack of `logits`, or of `word_logits` where the student is a captioner."""
        field = frozenset({"word_logits"} if "word_logits" in student else {"logits"})
        return {"student": field - student, "teacher": field - teacher}

    def count(self, labels: Tensor | None, examples: int) -> int:
        """Count the examples, of captions the words."""
        words = count_words(labels)
        return examples if words is None else words

    def forward(self, student: Signal, teacher: Signal | None, labels: Tensor | None = None) -> Loss:
        """Compare `logits` `[b, n_answers]` of both sides, or `word_logits` at the places where `labels` has words."""
        field = "logits" if student.word_logits is None else "word_logits"
        z_s, z_t = self.take(student, "student", field), self.take(teacher, "teacher", field)
        assert isinstance(z_s, Tensor)
        assert isinstance(z_t, Tensor)
        if z_s.shape != z_t.shape:
            raise DistillError(
                f"objective 'logits': student logits {tuple(z_s.shape)} and teacher logits {tuple(z_t.shape)} differ; "
                "both must answer over the same vocabulary"
            )
        if student.word_logits is not None:
            if labels is None:
                raise DistillError("objective 'logits' was given no labels, which say where captions have words")
            if not (labels >= 0).any():
                return zero_like(z_s), (labels >= 0).sum()
            z_s, z_t = z_s[labels >= 0], z_t[labels >= 0]
        divergence = softmax_kl if self.link == "softmax" else bernoulli_kl
        return divergence(z_t.detach(), z_s, self.temperature).sum(), torch.tensor(len(z_s), device=z_s.device)


class Similarity(Objective):
    """Divergence of the student's image-text similarity rows and columns from the teacher's (CLIP-KD's CRD,
    Yang et al. 2024, eq. 3-5): the mean over both directions of `T^2 * KL`, within the batch.

    Args:
        temperature: T.
        weight: factor of this term.
    """

    kind = "similarity"
    source = "CLIP-KD (Yang et al. 2024), contrastive relational distillation"
    student_needs = frozenset({"similarity"})
    teacher_needs = frozenset({"similarity"})

    def __init__(self, *, temperature: float = 1.0, weight: float = 1.0) -> None:
        super().__init__(weight=weight)
        check_positive(self, "temperature", temperature)
        self.temperature = temperature

    def forward(self, student: Signal, teacher: Signal | None, labels: Tensor | None = None) -> Loss:
        """Compare `similarity` `[b, b]` of both sides; labels play no part."""
        s, t = self.take(student, "student", "similarity"), self.take(teacher, "teacher", "similarity")
        assert isinstance(s, Tensor)
        assert isinstance(t, Tensor)
        t = t.detach()
        total = softmax_kl(t, s, self.temperature).sum() + softmax_kl(t.T, s.T, self.temperature).sum()
        return total / 2, torch.tensor(len(s), device=s.device)


def softmax_kl(teacher: Tensor, student: Tensor, temperature: float) -> Tensor:
    """`T^2 KL(softmax(teacher / T) || softmax(student / T))` of `[b, c]` logits, one value per row."""
    log_t = F.log_softmax(teacher.float() / temperature, dim=-1)
    log_s = F.log_softmax(student.float() / temperature, dim=-1)
    return temperature**2 * (log_t.exp() * (log_t - log_s)).sum(-1)


def bernoulli_kl(teacher: Tensor, student: Tensor, temperature: float) -> Tensor:
    """`T^2` times the sum over answers of the divergence between `sigmoid(z / T)` of `[b, c]` logits, per row."""
    t, s = teacher.float() / temperature, student.float() / temperature
    cross = F.binary_cross_entropy_with_logits(s, t.sigmoid(), reduction="none")
    entropy = F.binary_cross_entropy_with_logits(t, t.sigmoid(), reduction="none")
    return temperature**2 * (cross - entropy).sum(-1)
