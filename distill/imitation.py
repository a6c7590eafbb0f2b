"""Imitation learning: a teacher's answers become labels, for want of anything better that it gives.

Several answers to a question are filtered as in self-consistency (Wang et al. 2023): what a teacher says again and
again is more often right than what it says once.
"""

from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor

from distill.errors import DistillError
from distill.signal import Request
from distill.teachers.answering import Answer, Answering, check_sampling
from distill.teachers.base import Teacher

Reason = Literal["kept", "unknown_to_the_teacher", "too_long", "no_agreement", "unsure", "outside_the_vocabulary"]
REASONS: tuple[Reason, ...] = (
    "kept",
    "unknown_to_the_teacher",
    "too_long",
    "no_agreement",
    "unsure",
    "outside_the_vocabulary",
)


@dataclass(frozen=True, kw_only=True)
class Filters:
    """Which answers are good enough to learn from.

    Attributes:
        agreement: least share of a question's samples that give its most frequent answer.
        confidence: least mean probability that the teacher gave to these samples; 0 asks for none.
        max_words: a longer most frequent answer is taken for a sentence about the question.
    """

    agreement: float = 0.0
    confidence: float = 0.0
    max_words: int = 5


@dataclass(frozen=True, kw_only=True)
class Judgement:
    """What a question's answers come to.

    Attributes:
        reason: `kept`, or why not.
        scores: place in the vocabulary -> share of the samples; empty unless kept. Samples outside the vocabulary keep
            their share to themselves, so a row may sum to less than one.
        agreement: share of the most frequent answer.
        confidence: mean probability of the samples with that answer; None where the teacher does not tell.
    """

    reason: Reason
    scores: Mapping[int, float]
    agreement: float
    confidence: float | None


def check_teacher_answers(teacher: Teacher, *, samples: int, temperature: float, confidence: float) -> None:
    """Refuse, before anything is asked, a teacher whose answers cannot be imitated.

    Raises:
        DistillError: it gives neither answers nor logits; draws are asked of one that answers in one way alone; or a
            confidence of one that tells none.
    """
    if not teacher.fields & {"answers", "logits"}:
        raise DistillError(
            f"the teacher {teacher.name} gives {', '.join(sorted(teacher.fields))}; labels: teacher needs answers or "
            "logits"
        )
    if "logits" in teacher.fields:
        return
    if (samples > 1 or temperature > 0) and not isinstance(teacher, Answering):
        raise DistillError(
            f"the teacher {teacher.name} has one answer to each question; set imitation.samples: 1 and temperature: 0"
        )
    if confidence > 0 and not getattr(teacher, "confident", False):
        raise DistillError(
            f"the teacher {teacher.name} tells no probability of its answers, so imitation.confidence must be 0; a "
            "server tells it with top_logprobs above 0"
        )


def answers_of(
    teacher: Teacher,
    inputs: Mapping[str, Any],
    *,
    names: Sequence[str],
    samples: int,
    temperature: float,
    seeds: Sequence[int],
) -> list[list[Answer]]:
    """Ask any teacher for answers.

    One that answers in words is asked; of any other, answers are drawn from its logits at the temperature, or the
    likeliest is taken at 0.

    Args:
        teacher: the teacher.
        inputs: what its `prepare` returned for `b` pairs.
        names: what its logits are over, where it does not say so itself.
        samples: answers per question.
        temperature: of the sampling.
        seeds: one per question, so that a question's answers do not depend on which others are asked along.

    Returns:
        `b` lists of `samples` answers.
    """
    if isinstance(teacher, Answering) and "logits" not in teacher.fields:
        return teacher.answer(inputs, samples=samples, temperature=temperature, seeds=seeds)
    if "logits" not in teacher.fields:
        told = teacher.signal(inputs, Request(fields=frozenset({"answers"}))).answers
        assert told is not None, "a teacher that gives answers gives answers"
        return [[Answer(text=text)] for text in told]
    logits = teacher.signal(inputs, Request(fields=frozenset({"logits"}))).logits
    assert logits is not None, "a teacher that gives logits gives logits"
    known = getattr(teacher, "answers", None) or names
    if logits.shape[-1] != len(known):
        raise DistillError(
            f"the teacher {teacher.name} has {logits.shape[-1]} logits, and the task {len(known)} answers; give both "
            "the same vocabulary"
        )
    return draw_answers(logits, known, samples=samples, temperature=temperature, seeds=seeds)


def draw_answers(
    logits: Tensor, names: Sequence[str], *, samples: int, temperature: float, seeds: Sequence[int]
) -> list[list[Answer]]:
    """Draw answers from logits `[b, n_answers]`; confidence is the probability at temperature 1."""
    check_sampling(samples, temperature)
    logits = logits.detach().float().cpu()
    sure = logits.softmax(-1)
    found = []
    for row, probabilities, seed in zip(logits, sure, seeds, strict=True):
        if temperature == 0:
            chosen = [int(row.argmax())]
        else:
            generator = torch.Generator().manual_seed(seed)
            spread = (row / temperature).softmax(-1)
            chosen = torch.multinomial(spread, samples, replacement=True, generator=generator).tolist()
        found.append([Answer(text=names[i], confidence=float(probabilities[i])) for i in chosen])
    return found


def judge(
    answers: Sequence[Answer], filters: Filters, *, place_of: Mapping[str, int], normal: Callable[[str], str]
) -> Judgement:
    """Filter one question's answers and turn them into soft scores.

    A score is the *share* of the samples, not `min(count / 3, 1)`: that rule is for ten people of whom three suffice,
    and would make full labels of any three of a hundred samples.

    Args:
        answers: the samples; none where the teacher knows nothing about the question.
        filters: what to keep.
        place_of: normal form -> place in the vocabulary.
        normal: what two answers must share to be the same.
    """
    if not answers:
        return Judgement(reason="unknown_to_the_teacher", scores={}, agreement=0.0, confidence=None)
    forms = [normal(answer.text) for answer in answers]
    counts = Counter(forms)
    best = max(counts, key=lambda form: (counts[form], -forms.index(form)))
    agreement = counts[best] / len(answers)
    known = [a.confidence for a, form in zip(answers, forms, strict=True) if form == best and a.confidence is not None]
    confidence = sum(known) / len(known) if known else None
    reason: Reason = "kept"
    if len(best.split()) > filters.max_words:
        reason = "too_long"
    elif best not in place_of:
        reason = "outside_the_vocabulary"
    elif agreement < filters.agreement:
        reason = "no_agreement"
    elif filters.confidence > 0 and (confidence is None or confidence < filters.confidence):
        reason = "unsure"
    scores = {place_of[form]: count / len(answers) for form, count in counts.items() if form in place_of}
    return Judgement(
        reason=reason, scores=scores if reason == "kept" else {}, agreement=agreement, confidence=confidence
    )
