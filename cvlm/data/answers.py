"""Answers of people as training targets: the vocabulary, soft scores, and what a vocabulary can reach."""

from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from cvlm.data.shard_index import Coverage
from cvlm.data.vqa_answers import clean_answer, normalize_answer

USUAL_MIN_COUNT = 9
"""Of VQA v2: leaves 3,129 answers (Teney et al. 2018)."""

UNLABELLED = -100


def default_min_count(questions: int) -> int:
    """Return 9, as usual for VQA v2, from 100,000 training questions on; small sets keep what occurs twice."""
    return USUAL_MIN_COUNT if questions >= 100_000 else min(2, max(1, questions // 100))


def normal_form(rule: str) -> Callable[[str], str]:
    """Return what two answers must share to be the same: the official normal form, or the text itself."""
    return (lambda answer: normalize_answer(clean_answer(answer))) if rule == "vqa" else clean_answer


def build_vocabulary(answers: Iterable[str], *, rule: str, min_count: int) -> tuple[str, ...]:
    """Return every answer that occurs often enough, the most frequent first, then by alphabet.

    Answers of one normal form count together; the most frequent spelling stands for them. That spelling matters: the
    official tool compares as written where all people agree, so `t shirt` would be wrong for ten times `t-shirt`.

    Args:
        answers: one per training question.
        rule: see `FolderIndex`.
        min_count: how often.
    """
    normal = normal_form(rule)
    spellings: dict[str, Counter[str]] = {}
    for answer, count in Counter(map(clean_answer, answers)).items():
        spellings.setdefault(normal(answer), Counter())[answer] += count
    kept = [(sum(counts.values()), counts) for form, counts in spellings.items() if form]
    kept = [(total, counts) for total, counts in kept if total >= min_count]
    chosen = [(-total, min(counts, key=lambda text: (-counts[text], text))) for total, counts in kept]
    return tuple(text for _, text in sorted(chosen))


def soft_scores(answers: Sequence[str], rule: str) -> dict[str, float]:
    """Return normal form -> score.

    `vqa`: min(count / 3, 1), the usual training target: unlike the metric it does not leave people out in turn.
    `exact`: 1 for each.
    """
    counts = Counter(map(normal_form(rule), answers))
    return {form: min(count / 3, 1.0) if rule == "vqa" else 1.0 for form, count in counts.items()}


def coverage(questions: Iterable[Sequence[str]], vocabulary: Sequence[str], rule: str) -> Coverage:
    """Measure what a vocabulary can reach of questions, each given by its people's answers."""
    known = set(map(normal_form(rule), vocabulary))
    number = answered = reachable = 0
    total = 0.0
    for answers in questions:
        number += 1
        answered += bool(answers)
        best = max((score for form, score in soft_scores(answers, rule).items() if form in known), default=0.0)
        reachable += best > 0
        total += best
    return Coverage(questions=number, answered=answered, reachable=reachable, ceiling=total / max(answered, 1))


def single_labels(given: Iterable[Sequence[str]], answers: Sequence[str]) -> NDArray[np.int64]:
    """Return the place of each question's one answer `[n]`; `UNLABELLED` where there is none in the vocabulary."""
    place = {answer: position for position, answer in enumerate(answers)}
    return np.array([place.get(one[0], UNLABELLED) if one else UNLABELLED for one in given], dtype=np.int64)


@dataclass(frozen=True, kw_only=True, eq=False)
class SoftLabels:
    """Soft answer scores `[n, n_answers]`, kept as the few that are not zero: VQA v2 would fill five gigabytes.

    Indexing with an index array gives a dense float32 `[b, n_answers]`, rows of -100 where the label is hidden.

    Attributes:
        starts: `[n + 1]` where each row begins in the next two.
        answer: `[m]` answer index.
        score: `[m]` float32 in (0, 1].
        width: n_answers.
        known: `[n]` False where the label is hidden. A known row may be all zero: no answer is in the vocabulary.
    """

    starts: NDArray[np.int64]
    answer: NDArray[np.int64]
    score: NDArray[np.float32]
    width: int
    known: NDArray[np.bool_]

    @classmethod
    def of(cls, questions: Iterable[Sequence[str]], vocabulary: Sequence[str], rule: str) -> "SoftLabels":
        """Score people's answers; a question without answers is hidden."""
        normal = normal_form(rule)
        position = {normal(answer): index for index, answer in enumerate(vocabulary)}
        starts, answer, score, known = [0], [], [], []
        for answers in questions:
            found = sorted((position[f], s) for f, s in soft_scores(answers, rule).items() if f in position)
            answer += [index for index, _ in found]
            score += [value for _, value in found]
            starts.append(len(answer))
            known.append(bool(answers))
        return cls(
            starts=np.array(starts, dtype=np.int64),
            answer=np.array(answer, dtype=np.int64),
            score=np.array(score, dtype=np.float32),
            width=len(vocabulary),
            known=np.array(known, dtype=np.bool_),
        )

    def __len__(self) -> int:
        return len(self.known)

    def __getitem__(self, index: Any) -> NDArray[np.float32]:
        rows = np.arange(len(self))[index]
        dense = np.zeros((np.size(rows), self.width), dtype=np.float32)
        for place, row in enumerate(np.atleast_1d(rows)):
            span = slice(self.starts[row], self.starts[row + 1])
            dense[place, self.answer[span]] = self.score[span]
        dense[~self.known[np.atleast_1d(rows)]] = UNLABELLED
        return dense if np.ndim(rows) else dense[0]

    def row(self, position: int) -> Mapping[int, float]:
        """Return answer index -> score of one pair; empty where it is hidden."""
        span = slice(self.starts[position], self.starts[position + 1])
        shown = self.known[position]
        return dict(zip(self.answer[span].tolist(), self.score[span].tolist(), strict=True)) if shown else {}

    def hide_all_but(self, kept: NDArray[np.int64]) -> "SoftLabels":
        """Return the labels with only some of them known."""
        known = np.zeros_like(self.known)
        known[kept] = self.known[kept]
        return SoftLabels(starts=self.starts, answer=self.answer, score=self.score, width=self.width, known=known)

    def first(self, number: int) -> "SoftLabels":
        """Return the labels of the first pairs."""
        end = self.starts[number]
        return SoftLabels(
            starts=self.starts[: number + 1],
            answer=self.answer[:end],
            score=self.score[:end],
            width=self.width,
            known=self.known[:number],
        )
