"""Where each query finds its best positive, block by block: the whole score matrix never stands in memory.

A positive's score is always read out of the matrix product that it is ranked in. Computed apart, it would differ in
the last bit and win or lose ties at random.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import pairwise

import numpy as np

# Scores that are alive at once: 32 MiB of float32. Smaller blocks make the matrix product slower, larger ones do not
# make it faster.
BLOCK_SCORES = 1 << 23
# Undecided comparisons that one product may leave behind, per query; a model that gives every pair one score leaves
# all of them, and two products then need less memory.
MAX_UNDECIDED = 64

TEXT_TO_IMAGE = "text_to_image"
IMAGE_TO_TEXT = "image_to_text"

ScoreRows = Callable[[int, int], np.ndarray]


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


@dataclass(frozen=True, kw_only=True)
class _Positives:
    """The positives of every query: those of query q are ``candidate[start[q]:start[q + 1]]``."""

    candidate: np.ndarray
    start: np.ndarray

    @classmethod
    def of_texts(cls, text_to_image: np.ndarray) -> "_Positives":
        return cls(candidate=text_to_image, start=np.arange(len(text_to_image) + 1))

    @classmethod
    def of_images(cls, text_to_image: np.ndarray) -> "_Positives":
        return cls(
            candidate=np.argsort(text_to_image, kind="stable"),
            start=np.concatenate([[0], np.cumsum(np.bincount(text_to_image))]),
        )

    def __len__(self) -> int:
        return len(self.start) - 1


def ranks_of_rows(text_rows: ScoreRows, image_rows: ScoreRows, text_to_image: np.ndarray) -> RetrievalRanks:
    """Rank from scores that can be had row by row.

    Args:
        text_rows: Gives the scores of texts ``start:stop`` with all images.
        image_rows: Gives the scores of images ``start:stop`` with all texts.
        text_to_image: Index of each text's image ``[n_text]``; every image has a text.

    Raises:
        ValueError: If a score is NaN.
    """
    texts, images = _Positives.of_texts(text_to_image), _Positives.of_images(text_to_image)
    return RetrievalRanks(
        text_to_image=_ranks(text_rows, texts, len(images)),
        image_to_text=_ranks(image_rows, images, len(texts)),
    )


def ranks_of_embeddings(image: np.ndarray, text: np.ndarray, text_to_image: np.ndarray) -> RetrievalRanks:
    """Rank by inner product; arguments and errors as in `ranks_of_rows`, embeddings are ``[n, d]``."""
    ranks = _ranks_of_one_product(image, text, text_to_image)
    if ranks is not None:
        return ranks
    return ranks_of_rows(
        lambda start, stop: text[start:stop] @ image.T,
        lambda start, stop: image[start:stop] @ text.T,
        text_to_image,
    )


def ranks_in_lists(candidate: np.ndarray, score: np.ndarray, positive: np.ndarray, behind: np.ndarray) -> np.ndarray:
    """Rank each query's best positive in a list of candidates of its own.

    Args:
        candidate: Index of each candidate ``[q, k]``, in no order; anything where the score is minus infinity.
        score: Their scores ``[q, k]``, minus infinity where a list has ended.
        positive: Whether a candidate is a right one ``[q, k]``.
        behind: Where a query without any positive in its list finds one in the ranking that the list was taken from
            ``[q]``; it counts as no better than just behind the list.

    Returns:
        Ranks ``[q]``, 0 for the top.

    Raises:
        ValueError: If a score is NaN.
    """
    if np.isnan(score).any():
        row = int(np.flatnonzero(np.isnan(score).any(axis=1))[0])
        raise ValueError(f"NaN among the scores of query {row}; check the model's match scores")
    best = np.where(positive, score, -np.inf).max(axis=1)[:, None]
    first = np.where(positive & (score == best), candidate, np.iinfo(candidate.dtype).max).min(axis=1)[:, None]
    ahead = (score > best) | ((score == best) & (candidate < first))
    # Rounding may put a positive that missed the list at a rank inside it: the two come from two matrix products.
    behind = np.maximum(behind, (score > -np.inf).sum(axis=1))
    return np.where(positive.any(axis=1), ahead.sum(axis=1), behind)


def _ranks(score_rows: ScoreRows, positives: _Positives, n_candidate: int) -> np.ndarray:
    ranks = np.empty(len(positives), dtype=np.int64)
    for start, stop in _blocks(len(positives), n_candidate):
        ranks[start:stop] = _rank_block(score_rows(start, stop), positives, start)
    return ranks


def _blocks(n_query: int, n_candidate: int) -> list[tuple[int, int]]:
    """Cut the queries into blocks of equal size, give or take one.

    A short last block would go through another kernel of the matrix product, and equal embeddings would get scores
    that differ in the last bit.
    """
    rows = max(1, BLOCK_SCORES // n_candidate)
    bounds = np.linspace(0, n_query, -(-n_query // rows) + 1).astype(int).tolist()
    return list(pairwise(bounds))


def _rank_block(scores: np.ndarray, positives: _Positives, start: int) -> np.ndarray:
    """Rank the queries whose rows are given, the first of which is number ``start``."""
    n_query, n_candidate = scores.shape
    if np.isnan(scores.min()):  # the minimum of anything with NaN is NaN
        # NaN compares false with everything, so it would rank first and score a broken model as perfect.
        last = start + n_query - 1
        raise ValueError(f"NaN among the scores of queries {start} to {last}; check the model's embeddings")
    bounds = positives.start[start : start + n_query + 1]
    candidate = positives.candidate[bounds[0] : bounds[-1]]
    first_of, row = bounds[:-1] - bounds[0], np.repeat(np.arange(n_query), np.diff(bounds))
    own = scores[row, candidate]
    best = np.maximum.reduceat(own, first_of)
    first = np.minimum.reduceat(np.where(own == best[row], candidate, n_candidate), first_of)
    ranks = np.count_nonzero(scores > best[:, None], axis=1)
    tied = np.count_nonzero(scores >= best[:, None], axis=1) - ranks
    for query in np.flatnonzero(tied > 1):
        ranks[query] += np.count_nonzero(scores[query, : first[query]] == best[query])
    return ranks


def _ranks_of_one_product(image: np.ndarray, text: np.ndarray, text_to_image: np.ndarray) -> RetrievalRanks | None:
    """Rank both ways out of one matrix product, or return None where that cannot be done.

    Images are ranked row by row. A text needs its positive's score, which stands in one row only: a guess at it,
    computed apart, decides all comparisons but the close ones, and these wait for the true score. The guess has to lie
    within the tolerance of the true score, and whether it does is checked, not assumed.
    """
    n_image, n_text = len(image), len(text)
    guess = _paired_products(image, text, text_to_image)
    tolerance = 16 * np.finfo(guess.dtype).eps * float(np.abs(guess).max(initial=0.0))
    low, high = guess - tolerance, guess + tolerance
    images = _Positives.of_images(text_to_image)
    ranks, above, true = np.empty(n_image, np.int64), np.zeros(n_text, np.int64), np.full(n_text, np.nan)
    undecided: list[tuple[np.ndarray, np.ndarray, np.ndarray]] = []
    for start, stop in _blocks(n_image, n_text):
        scores = image[start:stop] @ text.T
        ranks[start:stop] = _rank_block(scores, images, start)
        surely = scores > high
        above += surely.view(np.int8).sum(axis=0, dtype=np.int32)
        row, column = np.divmod(np.flatnonzero((scores >= low) ^ surely), n_text)
        undecided.append((column, row + start, scores[row, column]))
        own = images.candidate[images.start[start] : images.start[stop]]
        true[own] = scores[text_to_image[own] - start, own]
        del scores, surely  # or they would live on while the next block is computed
        if sum(len(part[0]) for part in undecided) > MAX_UNDECIDED * n_text:
            return None
    if not (np.abs(true - guess) <= tolerance).all():
        return None
    column, row, value = (np.concatenate(parts) for parts in zip(*undecided, strict=True))
    first = (value > true[column]) | ((value == true[column]) & (row < text_to_image[column]))
    above += np.bincount(column[first], minlength=n_text)
    return RetrievalRanks(text_to_image=above, image_to_text=ranks)


def _paired_products(image: np.ndarray, text: np.ndarray, text_to_image: np.ndarray) -> np.ndarray:
    """Return each text's inner product with its own image ``[n_text]``."""
    products = np.empty(len(text), dtype=np.result_type(image, text))
    for start, stop in _blocks(len(text), text.shape[1]):
        np.einsum("nd,nd->n", text[start:stop], image[text_to_image[start:stop]], out=products[start:stop])
    return products
