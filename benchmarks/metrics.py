"""Metrics as pure functions, each with its definition argued: VQA accuracy, accuracy, retrieval recall@k.

Every metric is a fraction in [0, 1].
"""

from collections import defaultdict
from collections.abc import Iterable, Sequence
from functools import lru_cache
from itertools import chain
from typing import Any

import numpy as np

from benchmarks.ranking import RetrievalRanks, ranks_of_embeddings, ranks_of_rows
from cvlm.data.vqa_answers import clean_answer, normalize_answer


def vqa_accuracy(prediction: str, answers: Sequence[str]) -> float:
    """Return the official VQA accuracy of one prediction (Antol et al., ICCV 2015; GT-Vision-Lab/VQA).

    Each person's answer is left out in turn; the prediction earns ``min(1, matches / 3)`` of the others, averaged over
    the turns. So three equal answers out of ten give 0.9, and fewer than four answers can never give 1. As in the
    official tool, answers and prediction are normalised only if the people disagree: where all ten say "Yes.", the
    prediction "yes" is wrong.

    Args:
        prediction: The model's answer, as it would be submitted.
        answers: The people's answers, ten in VQA v2; any number works.

    Raises:
        ValueError: If there is no answer.
    """
    if not answers:
        raise ValueError(f"cannot score {prediction!r}: the question has no ground-truth answers")
    prediction = clean_answer(prediction)
    truths = [clean_answer(answer) for answer in answers]
    if len(set(truths)) > 1:
        prediction = normalize_answer(prediction)
        truths = [normalize_answer(truth) for truth in truths]
    return _leave_one_out(bytes(truth == prediction for truth in truths))


def vqa_accuracies(predictions: Sequence[str], answers: Sequence[Sequence[str]]) -> np.ndarray:
    """Return `vqa_accuracy` of each question ``[n]``, the same to the last bit, at a fraction of the time.

    Answers repeat: 2 million of them in VQA v2's validation split are a few ten thousand strings, and ten answers can
    be hit in 1,024 ways. So each string is normalised once, and each way of being hit is scored once.

    Args:
        predictions: The model's answer to each question ``[n]``.
        answers: The people's answers to each question ``[n]``; their number may differ.

    Raises:
        ValueError: If the lengths differ or a question has no answer.
    """
    sizes = np.fromiter(map(len, answers), np.int64, len(answers))
    if len(predictions) != len(sizes):
        raise ValueError(f"{len(predictions)} predictions do not fit {len(sizes)} questions")
    if not sizes.size:
        return np.empty(0)
    if not sizes.all():
        position = int(np.flatnonzero(sizes == 0)[0])
        raise ValueError(f"cannot score {predictions[position]!r}: question {position} has no ground-truth answers")
    stops = np.cumsum(sizes)
    cleaned, normalised = _answer_codes(chain(predictions, chain.from_iterable(answers)), len(sizes) + int(stops[-1]))
    starts, truths = stops - sizes, cleaned[len(sizes) :]
    agreed = np.maximum.reduceat(truths, starts) == np.minimum.reduceat(truths, starts)
    predicted = np.where(agreed, cleaned[: len(sizes)], normalised[: len(sizes)])
    truths = np.where(np.repeat(agreed, sizes), truths, normalised[len(sizes) :])
    hits = (truths == np.repeat(predicted, sizes)).tobytes()
    score = lru_cache(maxsize=1 << 16)(_leave_one_out)
    spans = zip(starts.tolist(), stops.tolist(), strict=True)
    return np.fromiter((score(hits[start:stop]) for start, stop in spans), np.float64, len(sizes))


def _answer_codes(answers: Iterable[str], count: int) -> tuple[np.ndarray, np.ndarray]:
    """Number the cleaned and the normalised forms of the answers: equal numbers, equal forms ``[count]`` each."""
    seen, cleaned, normalised = _Numbers(), _Numbers(), _Numbers()
    codes = np.fromiter(map(seen.__getitem__, answers), np.int64, count)
    forms = [clean_answer(answer) for answer in seen]
    of_cleaned = np.array([cleaned[form] for form in forms])
    of_normalised = np.array([normalised[normalize_answer(form)] for form in forms])
    return of_cleaned[codes], of_normalised[codes]


class _Numbers(defaultdict[str, int]):
    """Gives each new string the next number; a known one is looked up without running Python code."""

    def __init__(self) -> None:
        super().__init__()
        self.default_factory = self.__len__


def _leave_one_out(hits: bytes) -> float:
    """Average ``min(1, matches / 3)`` over leaving out each answer; a byte is 1 where the prediction matches."""
    # Summed in the order of the answers, as the official tool does: equal to the last bit, not only to rounding.
    matches = sum(hits)
    return sum(min(1.0, (matches - hit) / 3) for hit in hits) / len(hits)


def accuracy(predictions: Any, targets: Any) -> float:
    """Return the share of predictions equal to their target.

    Args:
        predictions: Labels ``[n]``; an array, a tensor or a list.
        targets: Labels ``[n]``.

    Raises:
        ValueError: If the shapes differ or are empty.
    """
    predicted, wanted = _array(predictions), _array(targets)
    if predicted.shape != wanted.shape or predicted.size == 0:
        raise ValueError(f"accuracy needs equal, non-empty shapes, got {predicted.shape} and {wanted.shape}")
    return float(np.mean(predicted == wanted))


def retrieval_recall(image: Any, text: Any, text_to_image: Any, ks: Sequence[int] = (1, 5, 10)) -> dict[str, float]:
    """Return recall@k both ways for embeddings scored by inner product.

    Recall as CLIP-like papers and clip_benchmark mean it: per query 1 if at least one positive is among the top k,
    else 0, averaged over the queries. An image with five texts is one query of ``image_to_text``, not five.

    Ties: of equal scores the candidate with the lower index stands first. clip_benchmark leaves ties to ``torch.topk``,
    whose order is unspecified; without ties the two agree. A model that gives every pair one score is at chance here,
    not at 1.

    Args:
        image: Embeddings ``[n_image, d]``; normalise them first if the score is a cosine.
        text: Embeddings ``[n_text, d]``.
        text_to_image: Index of each text's image ``[n_text]``; several texts may share one.
        ks: The cut-offs; beyond the number of candidates recall is 1.

    Raises:
        ValueError: If shapes or indices do not fit, an image has no text, or a score is NaN.
    """
    return retrieval_ranks(image, text, text_to_image).recall(ks)


def recall_from_scores(scores: Any, text_to_image: Any, ks: Sequence[int] = (1, 5, 10)) -> dict[str, float]:
    """Return recall@k both ways from a score matrix ``[n_image, n_text]``, for scores that are no inner product.

    Definition, ties, other arguments and errors as in `retrieval_recall`. Pairs that were never scored (a re-ranker's)
    may hold minus infinity.
    """
    return ranks_from_scores(scores, text_to_image).recall(ks)


def retrieval_ranks(image: Any, text: Any, text_to_image: Any) -> RetrievalRanks:
    """Return each query's rank instead of the mean over queries; arguments and errors as in `retrieval_recall`."""
    image, text = _float_matrix(image, "image"), _float_matrix(text, "text")
    if image.shape[1] != text.shape[1]:
        raise ValueError(f"image embeddings {image.shape} and text embeddings {text.shape} differ in width")
    return ranks_of_embeddings(image, text, _positives(text_to_image, n_image=len(image), n_text=len(text)))


def ranks_from_scores(scores: Any, text_to_image: Any) -> RetrievalRanks:
    """Return each query's rank from a score matrix ``[n_image, n_text]``; see `recall_from_scores`."""
    scores = _float_matrix(scores, "scores")
    return ranks_of_rows(
        lambda start, stop: scores[:, start:stop].T,
        lambda start, stop: scores[start:stop],
        _positives(text_to_image, n_image=scores.shape[0], n_text=scores.shape[1]),
    )


def _positives(text_to_image: Any, *, n_image: int, n_text: int) -> np.ndarray:
    index = _array(text_to_image)
    if index.shape != (n_text,) or not np.issubdtype(index.dtype, np.integer):
        raise ValueError(f"text_to_image must hold {n_text} integers, got {index.dtype} {index.shape}")
    if index.size == 0 or index.min() < 0 or index.max() >= n_image:
        raise ValueError(f"text_to_image must point at images 0 to {n_image - 1}")
    missing = n_image - len(np.unique(index))
    if missing:
        raise ValueError(f"{missing} of {n_image} images have no text; leave them out, no query could find them")
    return index


def _float_matrix(values: Any, name: str) -> np.ndarray:
    matrix = _array(values)
    if matrix.ndim != 2 or matrix.size == 0:
        raise ValueError(f"{name} must be a non-empty matrix, got shape {matrix.shape}")
    return matrix if matrix.dtype == np.float64 else matrix.astype(np.float32, copy=False)


def _array(values: Any) -> np.ndarray:
    """Return a numpy array; a tensor is detached and fetched, and bfloat16, which numpy lacks, becomes float32."""
    if hasattr(values, "detach"):
        tensor = values.detach().cpu()
        return (tensor.float() if tensor.is_floating_point() and tensor.element_size() < 4 else tensor).numpy()
    return np.asarray(values)
