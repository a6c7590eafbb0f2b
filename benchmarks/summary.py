"""From per-example scores to what a result says: means with intervals, over all examples and per type."""

from collections import Counter
from collections.abc import Sequence
from typing import Any

import numpy as np

from benchmarks.captions import caption_definitions
from benchmarks.retrieval import retrieval_definitions
from benchmarks.statistics import arm_summary
from benchmarks.tasks import Scores
from cvlm.data import Examples

METRIC_DEFINITIONS = {
    "accuracy": "share of texts whose answer is the given one",
    "vqa_accuracy": "official VQA accuracy of the answer, see benchmarks.metrics.vqa_accuracy",
    "consistency": "share of statements that are judged right about every pair of pictures they stand with (NLVR2)",
    "two_picture_accuracy": "share of captions whose own picture scores above a wrong one; a tie counts half",
    **retrieval_definitions(),
}

RESAMPLES = 5000
TYPE_RESAMPLES = 1000
"""Draws of the bootstrap, over all examples and for one type: VQA v2 has 65 question types."""

MAX_TYPES = 100
OTHER = "(other)"


def metrics_of(scores: Scores, examples: Examples, *, folds: int = 1) -> dict[str, Any]:
    """Return metric -> definition, mean, 95 % interval, and over what the bootstrap went."""
    definitions = METRIC_DEFINITIONS | retrieval_definitions(folds) | caption_definitions()
    if examples.references:
        definitions["accuracy"] = METRIC_DEFINITIONS["vqa_accuracy"]
    return {
        name: {
            "definition": definitions[name],
            "n": len(values),
            **arm_summary(values[None], scores.clusters[name], resamples=RESAMPLES),
            "interval": f"95 % bootstrap over {bootstrap_unit(examples)}",
        }
        for name, values in scores.values.items()
    }


def bootstrap_unit(examples: Examples) -> str:
    """Name what is drawn with replacement, with everything that belongs to it."""
    return "pictures" if examples.image_of.ndim == 1 else "statements"


def by_type(scores: Scores, examples: Examples) -> dict[str, Any]:
    """Break the accuracy down by type of question and of answer, as far as the data names types.

    Returns:
        `question_type` and `answer_type`, each type -> `n`, `share` of all pairs, `mean`, and `ci95` where the type's
        pairs show at least two pictures. Types beyond the `MAX_TYPES` most frequent ones are taken together.
    """
    correct = scores.values.get("accuracy")
    # Over two pictures a type is the name of the pair, which says nothing.
    if correct is None or examples.image_of.ndim > 1:
        return {}
    tables = {"question_type": examples.types, "answer_type": examples.answer_types}
    return {
        table: _break_down(correct, scores.clusters["accuracy"], kinds) for table, kinds in tables.items() if any(kinds)
    }


def _break_down(correct: np.ndarray, clusters: np.ndarray, kinds: Sequence[str]) -> dict[str, Any]:
    counts = Counter(kind or OTHER for kind in kinds)
    kept = {kind for kind, _ in counts.most_common(MAX_TYPES)}
    names = np.array([kind if kind in kept else OTHER for kind in (kind or OTHER for kind in kinds)])
    return {
        str(kind): _one_type(correct[names == kind], clusters[names == kind], len(correct))
        for kind in sorted(np.unique(names), key=lambda kind: (-int((names == kind).sum()), kind))
    }


def _one_type(correct: np.ndarray, clusters: np.ndarray, total: int) -> dict[str, Any]:
    summary: dict[str, Any] = {"n": len(correct), "share": len(correct) / total, "mean": float(correct.mean())}
    if len(np.unique(clusters)) > 1:
        summary["ci95"] = arm_summary(correct[None], clusters, resamples=TYPE_RESAMPLES)["ci95"]
    return summary
