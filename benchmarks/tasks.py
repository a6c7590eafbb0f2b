"""How each task is scored: per-example values, so that arms can be compared pair by pair."""

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from benchmarks.captions import caption_values
from benchmarks.metrics import vqa_accuracies
from benchmarks.retrieval import score_retrieval
from cvlm.data import CaptionWords, Examples, SoftLabels, captions_of_pictures
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
    "text": "accuracy",
    "captioning": "cider",
}
"""The metric that a task's comparisons and verdict are about."""


@dataclass(frozen=True, kw_only=True)
class Scores:
    """Per-example values of one model on one split.

    Attributes:
        values: metric -> `[n]` fractions (CIDEr alone goes up to 10); the metric is their mean.
        clusters: metric -> `[n]` what the bootstrap resamples: the picture of each example, or over two pictures its
            statement.
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

    Answers: of the highest-scored one, see `score_answers`. `retrieval`: see `benchmarks.retrieval`. `captioning`: see
    `benchmarks.captions`; METEOR and SPICE are left to `score_captions`.
    """
    if TASKS[task].output == "words":
        assert prediction.captions is not None, "a captioner gives captions"
        return score_captions(examples, prediction.captions)
    if TASKS[task].output == "similarity":
        if prediction.retrieved is None:
            raise ValueError("retrieval is scored from embeddings, and the prediction has none")
        values, clusters = score_retrieval(examples, prediction.retrieved)
        return Scores(values=values, clusters=clusters)
    assert prediction.logits is not None, "a model that answers gives logits"
    chosen = prediction.logits.argmax(-1)
    return score_answers(examples, answer_accuracy(examples, chosen), prediction.logits)


def score_answers(
    examples: Examples, correct: NDArray[np.float64], logits: NDArray[np.float32] | None = None
) -> Scores:
    """Return every metric of a task that answers, whoever answered.

    Accuracy; over two pictures (`nlvr2`) consistency too; of captions that stand with a right and a wrong picture
    (`itm`) also the accuracy over the two.

    Args:
        examples: the split.
        correct: `[n]` score of each pair's answer.
        logits: `[n, n_answers]`, for the pairs of `matching_pairs` alone.
    """
    values, clusters = {"accuracy": correct}, {"accuracy": examples.unit_of}
    if examples.image_of.ndim == 2 and examples.image_of.shape[1] == 2:
        values["consistency"], clusters["consistency"] = consistency(correct, examples.text_of)
    if logits is not None and _is_matching(examples):
        values["two_picture_accuracy"] = two_picture_accuracy(logits)
        clusters["two_picture_accuracy"] = examples.image_of[: len(examples) // 2]
    return Scores(values=values, clusters=clusters)


def _is_matching(examples: Examples) -> bool:
    """Whether these are the pairs of `matching_pairs`: captions with their pictures, then the same with wrong ones."""
    n, odd = divmod(len(examples), 2)
    return (
        examples.answers == TASKS["itm"].answers
        and not odd
        and isinstance(examples.labels, np.ndarray)
        and bool((examples.labels == np.repeat([MATCH, MISMATCH], n)).all())
        and bool((examples.text_of[:n] == examples.text_of[n:]).all())
    )


def score_captions(examples: Examples, captions: Sequence[str], *, java: bool = False) -> Scores:
    """Score captions against all references of each picture.

    Args:
        examples: the split.
        captions: one for every picture of the split.
        java: also METEOR and SPICE, see `benchmarks.captions.caption_values`.
    """
    references = captions_of_pictures(examples)
    values = caption_values([captions[picture] for picture in references], list(references.values()), java=java)
    pictures = np.array(list(references), dtype=np.int64)
    return Scores(values=values, clusters=dict.fromkeys(values, pictures))


def consistency(correct: NDArray[np.float64], text_of: NDArray[np.int64]) -> tuple[Any, Any]:
    """Return 1 for each statement that is judged right about every pair of pictures, else 0 (NLVR2, Suhr et al. 2019).

    Args:
        correct: `[n]` 1 where the statement is judged right about the pair.
        text_of: `[n]` the statement of each pair.

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

    It sees no picture, so over a caption's two pictures it is at chance.

    For captioning it says the most frequent training caption about every picture; of several, the first by alphabet. It
    sees every training label, also those that the student does not.
    """
    if isinstance(train.labels, CaptionWords):
        counts = Counter(train.texts[text] for text in train.text_of)
        usual = min(counts, key=lambda caption: (-counts[caption], caption))
        return score_captions(test, [usual] * len(test.pictures))
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
    said = np.stack([guess == answer for answer in (MISMATCH, MATCH)], axis=1).astype(np.float32)
    return score_answers(test, answer_accuracy(test, guess), said)


def _answers_of(examples: Examples, position: int) -> dict[int, float]:
    """Return answer index -> score of a labelled pair."""
    if isinstance(examples.labels, SoftLabels):
        return dict(examples.labels.row(position))
    return {int(examples.labels[position]): 1.0}
