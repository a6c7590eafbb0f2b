"""Retrieval recall against clip_benchmark and against a full sort, with and without ties."""

import numpy as np
import pytest
import torch

from benchmarks import ranking
from benchmarks.metrics import recall_from_scores, retrieval_recall

KS = (1, 3, 5)


def make_data(seed, n_image=37, n_text=101, width=16, integer=False):
    rng = np.random.default_rng(seed)
    draw = (lambda shape: rng.integers(-1, 2, shape).astype(np.float32)) if integer else rng.standard_normal
    text_to_image = rng.permutation(np.concatenate([np.arange(n_image), rng.integers(0, n_image, n_text - n_image)]))
    return draw((n_image, width)), draw((n_text, width)), text_to_image


def sorted_recall(scores, positive, k, order):
    """Sort every row whole: ``order`` says which of two equal scores stands first."""
    candidates = np.broadcast_to(np.arange(scores.shape[1]), scores.shape)
    second = {"index": candidates, "kind": ~positive, "harsh": positive}[order]
    ranking = np.lexsort((candidates, second, -scores), axis=1)
    return np.take_along_axis(positive, ranking, axis=1)[:, :k].any(axis=1).mean()


def reference(image, text, text_to_image, order="index"):
    scores = text.astype(np.float64) @ image.T.astype(np.float64)
    positive = text_to_image[:, None] == np.arange(len(image))
    recall = {f"text_to_image_recall@{k}": sorted_recall(scores, positive, k, order) for k in KS}
    return recall | {f"image_to_text_recall@{k}": sorted_recall(scores.T, positive.T, k, order) for k in KS}


def clip_benchmark_recall(image, text, text_to_image):
    recall_at_k = pytest.importorskip("clip_benchmark.metrics.zeroshot_retrieval").recall_at_k
    scores = torch.tensor(text) @ torch.tensor(image).T
    positive = torch.zeros_like(scores, dtype=torch.bool)
    positive[torch.arange(len(text)), torch.tensor(text_to_image)] = True
    recall = {}
    for k in KS:
        recall[f"text_to_image_recall@{k}"] = (recall_at_k(scores, positive, k) > 0).float().mean().item()
        recall[f"image_to_text_recall@{k}"] = (recall_at_k(scores.T, positive.T, k) > 0).float().mean().item()
    return recall


@pytest.mark.parametrize("seed", range(5))
def test_equals_clip_benchmark_without_ties(seed):
    data = make_data(seed)
    assert retrieval_recall(*data, KS) == pytest.approx(clip_benchmark_recall(*data), abs=1e-6)


@pytest.mark.parametrize("seed", range(5))
def test_ties_lie_between_the_kind_and_the_harsh_order_as_in_clip_benchmark(seed):
    data = make_data(seed, width=4, integer=True)
    kind, harsh = reference(*data, order="kind"), reference(*data, order="harsh")
    assert kind != harsh, "the data has no ties that matter"
    for recall in (retrieval_recall(*data, KS), clip_benchmark_recall(*data)):
        for name, value in recall.items():
            assert harsh[name] - 1e-6 <= value <= kind[name] + 1e-6


@pytest.mark.parametrize("integer", [False, True])
@pytest.mark.parametrize("block", [1, 1000, 1 << 22])
def test_equals_a_full_sort_whatever_the_block(monkeypatch, integer, block):
    monkeypatch.setattr(ranking, "BLOCK_SCORES", block)
    data = make_data(7, width=4, integer=integer)
    assert retrieval_recall(*data, KS) == pytest.approx(reference(*data))


@pytest.mark.parametrize("integer", [False, True])
def test_scores_and_embeddings_agree(integer):
    image, text, text_to_image = make_data(3, integer=integer)
    assert recall_from_scores(image @ text.T, text_to_image, KS) == retrieval_recall(image, text, text_to_image, KS)
