"""How each task is scored: per-example values, so that arms can be compared pair by pair."""

from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from benchmarks.metrics import RetrievalRanks, ranks_from_scores, retrieval_ranks, vqa_accuracies
from cvlm.data import Examples, SoftLabels
from cvlm.data.matching import MATCH, MISMATCH
from cvlm.errors import CvlmError
from cvlm.files import write_with
from cvlm.tasks import TASKS
from cvlm.training import Prediction

PRIMARY: dict[str, str] = {
    "vqa": "accuracy",
    "retrieval": "text_to_image_recall@10",
    "nlvr2": "accuracy",
    "snli_ve": "accuracy",
    "itm": "accuracy",
}
"""The metric that a task's comparisons and verdict are about."""

RECALL_AT = (1, 5, 10)


@dataclass(frozen=True, kw_only=True)
class Scores:
    """Per-example values of one model on one split.

    Attributes:
        values: metric -> `[n]` fractions; the metric is their mean.
        clusters: metric -> `[n]` the picture of each example: what the bootstrap resamples.
    """

    values: dict[str, NDArray[np.float64]]
    clusters: dict[str, NDArray[np.int64]]

    def save(self, path: Path) -> None:
        """Write atomically, without pickle."""
        arrays: dict[str, NDArray[Any]] = {f"value/{name}": array for name, array in self.values.items()}
        arrays |= {f"cluster/{name}": array for name, array in self.clusters.items()}
        write_with(path, lambda file: np.savez_compressed(file, **arrays))  # type: ignore[arg-type]

    @classmethod
    def load(cls, path: Path) -> "Scores":
        """Read what `save` wrote."""
        with np.load(path, allow_pickle=False) as arrays:
            parts: dict[str, dict[str, NDArray[np.float64]]] = {"value": {}, "cluster": {}}
            for key in arrays.files:
                kind, _, name = key.partition("/")
                parts[kind][name] = arrays[key]
        return cls(values=parts["value"], clusters=parts["cluster"])  # type: ignore[arg-type]


def score(task: str, examples: Examples, prediction: Prediction) -> Scores:
    """Score a prediction by the task's official rule.

    Answers: accuracy of the highest-scored one, see `answer_accuracy`; `nlvr2` adds consistency, `itm` the accuracy
    over a caption's two pictures. `retrieval`: recall@1/5/10 both ways over all
    pictures and texts of the split; where a matching head re-ranked candidates, those stand above all others, by match
    score.
    """
    if TASKS[task].output == "similarity":
        return _score_retrieval(examples, prediction)
    assert prediction.logits is not None, "a model that answers gives logits"
    values = {"accuracy": answer_accuracy(examples, prediction.logits.argmax(-1))}
    clusters = {"accuracy": examples.unit_of}
    if task == "nlvr2":
        values["consistency"], clusters["consistency"] = consistency(values["accuracy"], examples.text_of)
    if task == "itm":
        values["two_picture_accuracy"] = two_picture_accuracy(prediction.logits)
        clusters["two_picture_accuracy"] = examples.image_of[: len(values["two_picture_accuracy"])]
    return Scores(values=values, clusters=clusters)


def consistency(correct: NDArray[np.float64], text_of: NDArray[np.int64]) -> tuple[Any, Any]:
    """Return 1 for each statement that is judged right about all its pictures, else 0 (NLVR2, Suhr et al. 2019).

    Args:
        correct: `[n]` 1 where the pair is judged right.
        text_of: `[n]` the statement of each pair; as in the official script, equal wording is one statement.

    Returns:
        `[statements]` values and their statements.
    """
    statements, of = np.unique(text_of, return_inverse=True)
    return 1.0 - (np.bincount(of, weights=correct < 1) > 0), statements


def two_picture_accuracy(logits: NDArray[np.float32]) -> NDArray[np.float64]:
    """Return 1 for each caption whose own picture scores above its wrong one, 0.5 for a tie `[n]`.

    Args:
        logits: `[2n, 2]` of `cvlm.data.matching.matching_pairs`: first the right pictures, then the wrong ones.
    """
    right, wrong = np.split(logits[:, MATCH] - logits[:, MISMATCH], 2)
    return np.where(right == wrong, 0.5, (right > wrong).astype(np.float64))


def answer_accuracy(examples: Examples, chosen: NDArray[np.int64]) -> NDArray[np.float64]:
    """Score one answer per pair: by the official VQA accuracy where people's answers are known, else right or wrong.

    Args:
        examples: the split.
        chosen: `[n]` index of each pair's answer.
    """
    if examples.references:
        return vqa_accuracies([examples.answers[answer] for answer in chosen], examples.references)
    if isinstance(examples.labels, SoftLabels):
        rows = (examples.labels.row(position) for position in range(len(examples)))
        return np.array([row.get(int(answer), 0.0) for answer, row in zip(chosen, rows, strict=True)])
    return (chosen == examples.labels).astype(np.float64)


def majority(train: Examples, test: Examples) -> Scores:
    """Score the honest baseline of tasks that answer: the most frequent training answer to the same text, else overall.

    It sees every training label, also those that the student does not.
    """
    overall: Counter[int] = Counter()  # of score, which is a fraction for soft labels
    per_text: dict[str, Counter[int]] = {}
    for position in train.labelled:
        given = _answers_of(train, position)
        overall.update(given)
        per_text.setdefault(train.texts[train.text_of[position]], Counter()).update(given)
    if not overall:
        raise CvlmError(f"no training pair of {train.name} has an answer; the majority baseline needs some")
    best = {text: counts.most_common(1)[0][0] for text, counts in per_text.items() if counts}
    fallback = overall.most_common(1)[0][0]
    guess = np.array([best.get(test.texts[text], fallback) for text in test.text_of])
    return Scores(values={"accuracy": answer_accuracy(test, guess)}, clusters={"accuracy": test.unit_of})


def _answers_of(examples: Examples, position: int) -> dict[int, float]:
    """Return answer index -> score of a labelled pair."""
    if isinstance(examples.labels, SoftLabels):
        return dict(examples.labels.row(position))
    return {int(examples.labels[position]): 1.0}


def _score_retrieval(examples: Examples, prediction: Prediction) -> Scores:
    if prediction.images is None or prediction.texts is None:
        raise ValueError("retrieval is scored from embeddings, and the prediction has none")
    pairs = np.unique(np.stack([examples.text_of, examples.image_of]), axis=1)
    text_to_image = pairs[1]
    if len(np.unique(pairs[0])) < pairs.shape[1]:
        twice = examples.texts[int(pairs[0][np.flatnonzero(np.diff(pairs[0]) == 0)[0]])]
        raise CvlmError(
            f"the text {twice!r} stands with several pictures; give retrieval each caption as a text of its own"
        )
    ranks: RetrievalRanks
    if prediction.rerank is None:
        ranks = retrieval_ranks(prediction.images, prediction.texts, text_to_image)
    else:
        # Double precision: a shift of single-precision scores would turn close ones into ties.
        rerank, similarity = prediction.rerank.double(), (prediction.images @ prediction.texts.T).double()
        chosen = rerank != -torch.inf
        shift = similarity.max() - rerank[chosen].min() + 1
        ranks = ranks_from_scores(torch.where(chosen, rerank + shift, similarity), text_to_image)
    values, clusters = {}, {}
    for k in RECALL_AT:
        hits = ranks.hits(k)
        for direction, own in (("text_to_image", text_to_image), ("image_to_text", np.arange(len(examples.pictures)))):
            name = f"{direction}_recall@{k}"
            values[name], clusters[name] = np.asarray(hits[direction], dtype=np.float64), own
    return Scores(values=values, clusters=clusters)
