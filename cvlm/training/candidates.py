"""Which candidates a retrieval query is compared with: the folds of a protocol, and the best few of each fold."""

from dataclasses import dataclass
from itertools import pairwise

import numpy as np
from numpy.typing import NDArray
from torch import Tensor

from cvlm.data import Examples
from cvlm.errors import CvlmError

Indices = NDArray[np.int64]

NONE = -1
"""Stands where a list of candidates is shorter than the longest one."""

# Scores that are alive at once: 32 MiB of float32. Smaller blocks make the matrix product slower, larger ones do not
# make it faster.
BLOCK_SCORES = 1 << 23


@dataclass(frozen=True, kw_only=True, eq=False)
class Candidates:
    """The candidates of some queries of one direction, in no order, with the scores of these pairs.

    Attributes:
        query: `[q]` the queries' positions in the split.
        candidate: `[q, k]` positions of candidates in the split, `NONE` behind the end of a shorter list.
        score: `[q, k]` float32, minus infinity where there is no candidate.
    """

    query: Indices
    candidate: Indices
    score: NDArray[np.float32]


@dataclass(frozen=True, kw_only=True, eq=False)
class Fold:
    """Pictures and texts that are ranked among each other.

    Attributes:
        pictures: `[n]` positions in the split, rising.
        texts: `[m]` likewise; every text whose picture is in the fold.
    """

    pictures: Indices
    texts: Indices


def image_of_texts(examples: Examples) -> Indices:
    """Return the picture of each text `[texts]`.

    Raises:
        CvlmError: a text stands with several pictures.
    """
    text, image = np.unique(np.stack([examples.text_of, examples.image_of]), axis=1)
    if len(np.unique(text)) < len(text):
        twice = examples.texts[int(text[np.flatnonzero(np.diff(text) == 0)[0]])]
        raise CvlmError(
            f"the text {twice!r} stands with several pictures; give retrieval each caption as a text of its own"
        )
    return image


def make_folds(image_of: Indices, folds: int) -> list[Fold]:
    """Cut a split into folds of consecutive pictures, in the order of the data (VSE++, Faghri et al. 2018).

    Where the number of pictures is no multiple of `folds`, the first folds hold one picture more.

    Args:
        image_of: `[texts]` picture of each text; every picture has one.
        folds: how many.

    Raises:
        CvlmError: there is no fold, or one would hold fewer than two pictures.
    """
    pictures = int(image_of.max()) + 1
    if not 1 <= folds <= pictures // 2:
        raise CvlmError(
            f"{folds} folds of {pictures} pictures: a fold needs at least 2; use 1 to {max(1, pictures // 2)} folds"
        )
    return [
        Fold(pictures=members, texts=np.flatnonzero((image_of >= members[0]) & (image_of <= members[-1])))
        for members in np.array_split(np.arange(pictures), folds)
    ]


def top_candidates(queries: Tensor, candidates: Tensor, k: int) -> Indices:
    """Return the candidates of highest inner product; of equal ones, those with the lower index.

    The score matrix is computed in blocks and never stands in memory whole.

    Args:
        queries: `[q, e]`.
        candidates: `[c, e]`.
        k: how many; all if there are no more.

    Returns:
        `[q, min(k, c)]`.
    """
    if k >= len(candidates):
        return np.tile(np.arange(len(candidates)), (len(queries), 1))
    # Blocks of equal size, give or take one: a short last one would go through another kernel of the matrix product.
    blocks = -(-len(queries) // max(1, BLOCK_SCORES // len(candidates)))
    bounds = np.linspace(0, len(queries), blocks + 1).astype(int).tolist()
    return np.concatenate([_top(queries[start:stop] @ candidates.T, k) for start, stop in pairwise(bounds)])


def _top(scores: Tensor, k: int) -> Indices:
    value, index = scores.topk(k, dim=1)
    # topk leaves open which of several equal scores it takes.
    for row in ((scores >= value[:, -1:]).sum(1) > k).nonzero().flatten():
        index[row] = scores[row].argsort(descending=True, stable=True)[:k]
    return index.numpy()


def fold_candidates(folds: list[Fold], images: Tensor, texts: Tensor, k: int | None) -> tuple[Indices, Indices]:
    """Return the best candidates of every text and of every picture within its fold.

    Args:
        folds: of the split.
        images: `[pictures, e]` embeddings.
        texts: `[texts, e]` embeddings.
        k: how many per query; None for all of the fold.

    Returns:
        Pictures `[texts, k]` and texts `[pictures, k]`, each filled up with `NONE`.
    """
    widest_images = max(len(fold.pictures) for fold in folds)
    widest_texts = max(len(fold.texts) for fold in folds)
    of_texts = np.full((len(texts), min(k or widest_images, widest_images)), NONE)
    of_images = np.full((len(images), min(k or widest_texts, widest_texts)), NONE)
    for fold in folds:
        image, text = images[fold.pictures], texts[fold.texts]
        best = fold.pictures[top_candidates(text, image, k or len(image))]
        of_texts[fold.texts, : best.shape[1]] = best
        best = fold.texts[top_candidates(image, text, k or len(text))]
        of_images[fold.pictures, : best.shape[1]] = best
    return of_texts, of_images


def fold_members(folds: list[Fold], queries: Indices, *, of_texts: bool) -> Indices:
    """Return all candidates of some queries `[q, widest fold]`, filled up with `NONE`.

    Args:
        folds: of the split.
        queries: `[q]` positions of texts or of pictures.
        of_texts: whether the queries are texts, their candidates then pictures.
    """
    widest = max(len(fold.pictures if of_texts else fold.texts) for fold in folds)
    found = np.full((len(queries), widest), NONE)
    for fold in folds:
        asking, asked = (fold.texts, fold.pictures) if of_texts else (fold.pictures, fold.texts)
        found[np.isin(queries, asking), : len(asked)] = asked
    return found
