"""Metrics as pure functions, each with its definition argued: VQA accuracy, accuracy, retrieval recall@k.

Every metric is a fraction in [0, 1].
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from cvlm.data.vqa_answers import clean_answer, normalize_answer

# Scores that are alive at once: 16 MiB of float32, so that 5,000 images x 25,000 texts never stand in memory whole.
_BLOCK_SCORES = 1 << 22

TEXT_TO_IMAGE = "text_to_image"
IMAGE_TO_TEXT = "image_to_text"


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
    hits = [truth == prediction for truth in truths]
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


@dataclass(frozen=True, kw_only=True, eq=False)
class RetrievalRanks:
    """Where each query finds its best positive: 0 is the top of the list.

    Attributes:
        text_to_image: Rank of each text's image among all images ``[n_text]``.
        image_to_text: Rank of each image's best text among all texts ``[n_image]``.
    """

    text_to_image: np.ndarray
    image_to_text: np.ndarray

    def hits(self, k: int) -> dict[str, np.ndarray]:
        """Return, per direction, whether each query finds a positive in its top k, as floats (for the bootstrap)."""
        return {
            TEXT_TO_IMAGE: (self.text_to_image < k).astype(np.float64),
            IMAGE_TO_TEXT: (self.image_to_text < k).astype(np.float64),
        }

    def recall(self, ks: Sequence[int] = (1, 5, 10)) -> dict[str, float]:
        """Return ``{"text_to_image_recall@1": ..., "image_to_text_recall@1": ..., ...}``."""
        if any(k < 1 for k in ks):
            raise ValueError(f"recall@k needs k of at least 1, got {tuple(ks)}")
        return {f"{name}_recall@{k}": float(hit.mean()) for k in ks for name, hit in self.hits(k).items()}


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
    return _ranks(
        lambda start, stop: text[start:stop] @ image.T,
        lambda start, stop: image[start:stop] @ text.T,
        _positives(text_to_image, n_image=len(image), n_text=len(text)),
        n_image=len(image),
    )


def ranks_from_scores(scores: Any, text_to_image: Any) -> RetrievalRanks:
    """Return each query's rank from a score matrix ``[n_image, n_text]``; see `recall_from_scores`."""
    scores = _float_matrix(scores, "scores")
    return _ranks(
        lambda start, stop: scores[:, start:stop].T,
        lambda start, stop: scores[start:stop],
        _positives(text_to_image, n_image=scores.shape[0], n_text=scores.shape[1]),
        n_image=scores.shape[0],
    )


ScoreRows = Callable[[int, int], np.ndarray]


def _ranks(text_rows: ScoreRows, image_rows: ScoreRows, text_to_image: np.ndarray, *, n_image: int) -> RetrievalRanks:
    images = np.arange(n_image)
    return RetrievalRanks(
        text_to_image=_best_ranks(text_rows, text_to_image, images),
        image_to_text=_best_ranks(image_rows, images, text_to_image),
    )


def _best_ranks(score_rows: ScoreRows, query_image: np.ndarray, candidate_image: np.ndarray) -> np.ndarray:
    """Return the rank of each query's best positive; a candidate is positive if it shows the query's image.

    The positive's own score is read out of the block it is ranked in: computed apart, it would differ in the last bit
    and lose or win ties at random.
    """
    n_query, n_candidate = len(query_image), len(candidate_image)
    ranks = np.empty(n_query, dtype=np.int64)
    rows = max(1, _BLOCK_SCORES // n_candidate)
    position = np.arange(n_candidate)
    for start in range(0, n_query, rows):
        stop = min(start + rows, n_query)
        scores = score_rows(start, stop)
        if np.isnan(scores).any():
            # NaN compares false with everything, so it would rank first and score a broken model as perfect.
            raise ValueError(f"NaN among the scores of queries {start} to {stop - 1}; check the model's embeddings")
        positive = query_image[start:stop, None] == candidate_image[None, :]
        best = np.where(positive, scores, -np.inf).max(axis=1, keepdims=True)
        tied = scores == best
        first = (positive & tied).argmax(axis=1)[:, None]
        ranks[start:stop] = (scores > best).sum(axis=1) + (tied & (position < first)).sum(axis=1)
    return ranks


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
    return matrix if matrix.dtype == np.float64 else matrix.astype(np.float32)


def _array(values: Any) -> np.ndarray:
    """Return a numpy array; a tensor is detached and fetched, and bfloat16, which numpy lacks, becomes float32."""
    if hasattr(values, "detach"):
        tensor = values.detach().cpu()
        return (tensor.float() if tensor.is_floating_point() and tensor.element_size() < 4 else tensor).numpy()
    return np.asarray(values)
