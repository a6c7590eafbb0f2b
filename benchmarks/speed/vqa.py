"""VQA accuracy of a whole split: `vqa_accuracies` beside the loop of the official tool."""

import copy
import json
from typing import Any

import numpy as np

from benchmarks.metrics import vqa_accuracies
from benchmarks.speed.reference_vqa import evaluate
from benchmarks.speed.timing import Work, setting, time_pair

QUESTIONS = 214_354
"""Questions of the VQA v2 validation split."""

_DISTINCT_ANSWERS = 4000
_WORDS = ("red", "dog", "left", "tennis racket", "Yes", "the table", "t-shirt", "don't know", "1,000", "two", "no.")


def compare(questions: int = QUESTIONS, repeats: int = 3) -> dict[str, Any]:
    """Time both on made-up questions in the official format and check that every score is the same.

    Taking the strings out of the official format is part of our time; the tool's loop works on the format itself.

    Raises:
        AssertionError: If a score differs.
    """
    annotations, results = make_split(questions)
    scores: dict[str, Any] = {}

    def ours() -> Work:
        return lambda: scores.update(ours=_score(annotations, results))

    def reference() -> Work:
        fresh = copy.deepcopy(annotations)  # the loop rewrites its answers
        return lambda: scores.update(reference=evaluate(fresh, results))

    timing = time_pair(ours, reference, repeats)
    assert scores["ours"].tolist() == scores["reference"], "the two ways disagree"
    return {
        "work": "VQA accuracy of every question",
        "beside": "a direct port of the official loop (benchmarks/speed/reference_vqa.py)",
        "size": {"questions": questions, "answers_per_question": 10, "distinct_answers": _distinct(annotations)},
        **timing,
        "equal": "every score, to the last bit",
        **setting(["numpy"]),
    }


def make_split(questions: int, seed: int = 0) -> tuple[dict[int, Any], dict[int, Any]]:
    """Make annotations and results in VQA v2's format, by question id.

    Ten people; most agree with the question's own answer, the others choose among a few thousand answers of which few
    are frequent, as in the real split. Through JSON, so that equal answers are different strings in memory, as on disk.
    """
    rng = np.random.default_rng(seed)
    answers = [f"{_WORDS[i % len(_WORDS)]} {i}" if i >= len(_WORDS) else _WORDS[i] for i in range(_DISTINCT_ANSWERS)]
    frequency = 1 / np.arange(1, _DISTINCT_ANSWERS + 1)
    frequency /= frequency.sum()
    own = rng.choice(_DISTINCT_ANSWERS, (questions, 1), p=frequency)
    other = rng.choice(_DISTINCT_ANSWERS, (questions, 11), p=frequency)
    agreement = rng.beta(2, 1, (questions, 1))  # two thirds on average; unanimous questions are frequent
    chosen = np.where(rng.random((questions, 11)) < agreement, own, other).tolist()
    annotations = [
        {
            "question_id": number,
            "answers": [
                {"answer": answers[index], "answer_confidence": "yes", "answer_id": person}
                for person, index in enumerate(people[:10], start=1)
            ],
        }
        for number, people in enumerate(chosen)
    ]
    results = [{"question_id": number, "answer": answers[people[10]]} for number, people in enumerate(chosen)]
    by_id = ({item["question_id"]: item for item in json.loads(json.dumps(items))} for items in (annotations, results))
    return next(by_id), next(by_id)


def _score(annotations: dict[int, Any], results: dict[int, Any]) -> np.ndarray:
    return vqa_accuracies(
        [results[question]["answer"] for question in annotations],
        [[answer["answer"] for answer in item["answers"]] for item in annotations.values()],
    )


def _distinct(annotations: dict[int, Any]) -> int:
    return len({answer["answer"] for item in annotations.values() for answer in item["answers"]})
