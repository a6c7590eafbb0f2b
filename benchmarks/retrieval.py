"""How retrieval is scored: ranks in two stages, folds, and what stage 1 cost on a sample of queries."""

from typing import Any

import numpy as np
from numpy.typing import NDArray

from benchmarks.metrics import retrieval_ranks
from benchmarks.ranking import IMAGE_TO_TEXT, TEXT_TO_IMAGE, RetrievalRanks, ranks_in_lists
from cvlm.data import Examples
from cvlm.training import NONE, Candidates, Lists, Retrieved, image_of_texts, make_folds

RECALL_AT = (1, 5, 10)

Values = dict[str, NDArray[np.float64]]
Clusters = dict[str, NDArray[np.int64]]


def score_retrieval(examples: Examples, retrieved: Retrieved) -> tuple[Values, Clusters]:
    """Return recall@1/5/10 both ways, per query: metric -> `[n]` hits and metric -> `[n]` pictures."""
    text_to_image = image_of_texts(examples)
    ranks = ranks_of_retrieved(text_to_image, retrieved)
    clusters = {TEXT_TO_IMAGE: text_to_image, IMAGE_TO_TEXT: np.arange(len(examples.pictures))}
    values = {f"{name}_recall@{k}": hits for k in RECALL_AT for name, hits in ranks.hits(k).items()}
    return values, {name: clusters[name.partition("_recall")[0]] for name in values}


def ranks_of_retrieved(text_to_image: NDArray[np.int64], retrieved: Retrieved) -> RetrievalRanks:
    """Return where each query finds its best positive within its fold.

    A positive that is a candidate has its rank among the query's re-ranked candidates. One that is not stands behind
    all of them, at its rank by embeddings. Of several positives the best one counts. Of equal scores the lower index
    stands first, in either stage.

    Args:
        text_to_image: `[texts]` picture of each text.
        retrieved: what the model gave.

    Raises:
        ValueError: a score is NaN.
    """
    ranks = first_stage_ranks(text_to_image, retrieved)
    if retrieved.reranked is None:
        return ranks
    return _ranks_in_lists(text_to_image, retrieved.reranked, ranks)


def first_stage_ranks(text_to_image: NDArray[np.int64], retrieved: Retrieved) -> RetrievalRanks:
    """Return where each query finds its best positive within its fold, by embeddings alone."""
    image, text = retrieved.images.numpy(), retrieved.texts.numpy()
    ranks = RetrievalRanks(text_to_image=np.empty(len(text), np.int64), image_to_text=np.empty(len(image), np.int64))
    for fold in make_folds(text_to_image, retrieved.folds):
        own = retrieval_ranks(image[fold.pictures], text[fold.texts], text_to_image[fold.texts] - fold.pictures[0])
        ranks.text_to_image[fold.texts], ranks.image_to_text[fold.pictures] = own.text_to_image, own.image_to_text
    return ranks


def sample_comparison(examples: Examples, retrieved: Retrieved) -> dict[str, Any] | None:
    """Return, on a sample of queries, the recalls of two stages, those of scoring every candidate, and the difference.

    None where there is no sample. Both rankings read the same scores, so the difference is due to stage 1 alone.
    """
    if retrieved.sample is None:
        return None
    text_to_image = image_of_texts(examples)
    sample, ranks = retrieved.sample, ranks_of_retrieved(text_to_image, retrieved)
    two_stage = RetrievalRanks(
        text_to_image=ranks.text_to_image[sample.text_to_image.query],
        image_to_text=ranks.image_to_text[sample.image_to_text.query],
    )
    found, wanted = two_stage.recall(RECALL_AT), _ranks_in_lists(text_to_image, sample, two_stage).recall(RECALL_AT)
    return {
        "queries": len(sample.text_to_image.query),
        "two_stage": found,
        "exhaustive": wanted,
        "difference": {name: found[name] - wanted[name] for name in found},
    }


def retrieval_definitions(folds: int = 1) -> dict[str, str]:
    """Return metric -> what it means."""
    where = "of the whole split" if folds == 1 else f"of its own fold, of {folds} in the order of the data"
    queries = (("text_to_image", "texts", "picture"), ("image_to_text", "pictures", "text"))
    return {
        f"{direction}_recall@{k}": f"share of {query} with a right {answer} among the {k} best {where}"
        for direction, query, answer in queries
        for k in RECALL_AT
    }


def protocol(examples: Examples, folds: int) -> dict[str, Any]:
    """Return what is ranked among each other: a name, and the sizes of the smallest and of the largest fold."""
    members = make_folds(image_of_texts(examples), folds)
    pictures, texts = [len(fold.pictures) for fold in members], [len(fold.texts) for fold in members]
    size = f"{min(pictures):,}" if min(pictures) == max(pictures) else f"{min(pictures):,} to {max(pictures):,}"
    return {
        "name": "the whole split" if folds == 1 else f"{folds} folds of {size} pictures, in the order of the data",
        "folds": folds,
        "pictures_per_fold": [min(pictures), max(pictures)],
        "texts_per_fold": [min(texts), max(texts)],
    }


def _ranks_in_lists(text_to_image: NDArray[np.int64], lists: Lists, behind: RetrievalRanks) -> RetrievalRanks:
    texts, images = lists.text_to_image, lists.image_to_text
    return RetrievalRanks(
        text_to_image=_rank(texts, text_to_image[texts.query][:, None] == texts.candidate, behind.text_to_image),
        image_to_text=_rank(images, text_to_image[images.candidate] == images.query[:, None], behind.image_to_text),
    )


def _rank(lists: Candidates, positive: NDArray[np.bool_], behind: NDArray[np.int64]) -> NDArray[np.int64]:
    return ranks_in_lists(lists.candidate, lists.score, positive & (lists.candidate != NONE), behind)
