"""Retrieval recall against clip_benchmark and against a full sort, with and without ties."""

import numpy as np
import pytest
import torch

from benchmarks import ranking
from benchmarks.metrics import recall_from_scores, retrieval_ranks, retrieval_recall

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


@pytest.fixture
def two_products(monkeypatch):
    """Give the ranks of embeddings by the plain way: one matrix product for each direction."""

    def rank(*data):
        with monkeypatch.context() as patch:
            patch.setattr(ranking, "MAX_UNDECIDED", -1)
            return retrieval_ranks(*data)

    return rank


@pytest.mark.parametrize("integer", [False, True])
@pytest.mark.parametrize("scale", [1.0, 2.0**-40, 2.0**40])
@pytest.mark.parametrize("block", [1, 300, 1 << 22])
def test_one_product_ranks_as_two(monkeypatch, two_products, integer, scale, block):
    monkeypatch.setattr(ranking, "BLOCK_SCORES", block)
    image, text, text_to_image = make_data(11, n_image=60, n_text=240, integer=integer)
    data = image * scale, text, text_to_image
    assert ranking._ranks_of_one_product(*data) is not None
    one, two = retrieval_ranks(*data), two_products(*data)
    np.testing.assert_array_equal(one.text_to_image, two.text_to_image)
    np.testing.assert_array_equal(one.image_to_text, two.image_to_text)


def test_close_scores_are_ranked_by_the_product_itself():
    """Images that differ in the last bits: a positive's score computed apart would rank at random among them."""
    rng = np.random.default_rng(0)
    base = rng.standard_normal(64, dtype=np.float32)
    image = base * (1 + 1e-7 * rng.integers(0, 4, (40, 1))).astype(np.float32)
    text = rng.standard_normal((80, 64), dtype=np.float32)
    text_to_image = np.arange(80) % 40
    scores = image @ text.T  # one block, so the same product
    true = scores[text_to_image, np.arange(80)]
    index = np.arange(40)[:, None]
    expected = ((scores > true) | ((scores == true) & (index < text_to_image))).sum(axis=0)
    assert len(np.unique(expected)) > 10, "the scores are close, not equal"
    np.testing.assert_array_equal(retrieval_ranks(image, text, text_to_image).text_to_image, expected)


def test_a_collapsed_model_is_ranked_by_two_products():
    image, text, text_to_image = np.ones((200, 16)), np.ones((400, 16)), np.arange(400) % 200
    assert ranking._ranks_of_one_product(image, text, text_to_image) is None, "every comparison is undecided"
    ranks = retrieval_ranks(image, text, text_to_image)
    assert ranks.text_to_image.tolist() == text_to_image.tolist(), "of equals the lower index stands first"
    assert ranks.image_to_text.tolist() == list(range(200))


def test_a_guess_that_misses_the_product_is_not_used(monkeypatch):
    data = make_data(2)
    expected = retrieval_recall(*data, KS)
    monkeypatch.setattr(ranking, "_paired_products", lambda image, text, index: np.zeros(len(text)))
    assert ranking._ranks_of_one_product(*data) is None
    assert retrieval_recall(*data, KS) == expected


@pytest.mark.parametrize("width", [64, 512])
def test_equal_embeddings_tie_wherever_their_blocks_are(monkeypatch, width):
    monkeypatch.setattr(ranking, "BLOCK_SCORES", 130 * 900)
    rng = np.random.default_rng(1)
    half = rng.standard_normal((341, width), dtype=np.float32)
    text = rng.standard_normal((900, width), dtype=np.float32)
    text_to_image = np.arange(900) % 341
    ranks = retrieval_ranks(half, text, text_to_image).text_to_image
    # Every image stands twice, its double behind all originals, with a text of its own.
    texts, of = np.concatenate([text, text[:341]]), np.concatenate([text_to_image, np.arange(341) + 341])
    doubled = retrieval_ranks(np.concatenate([half, half]), texts, of).text_to_image
    np.testing.assert_array_equal(doubled[:900], 2 * ranks, "the original stands before its own double")
    np.testing.assert_array_equal(doubled[900:], 2 * ranks[:341] + 1)
