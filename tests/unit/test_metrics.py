"""Metrics: small cases by hand, kinds of input, and what is refused. Parity lives in tests/parity."""

import numpy as np
import pytest
import torch

from benchmarks.metrics import accuracy, ranks_from_scores, recall_from_scores, retrieval_recall, vqa_accuracy

# Three images, five texts; texts 0-1 show image 0, text 2 image 1, texts 3-4 image 2.
TEXT_TO_IMAGE = [0, 0, 1, 2, 2]
SCORES = np.array(
    [
        # text 0    1    2    3    4
        [0.9, 0.1, 0.8, 0.2, 0.3],
        [0.5, 0.6, 0.7, 0.4, 0.1],
        [0.4, 0.5, 0.9, 0.3, 0.2],
    ]
)


def test_ranks_by_hand():
    ranks = ranks_from_scores(SCORES, TEXT_TO_IMAGE)
    # Text 1 prefers images 1 and 2 to its own; text 2 prefers both others; text 3 prefers image 1; text 4 image 0.
    assert ranks.text_to_image.tolist() == [0, 2, 2, 1, 1]
    # Image 0's text 0 is its best; image 1's text 2 too; image 2's best text, 3, stands behind 2, 1 and 0.
    assert ranks.image_to_text.tolist() == [0, 0, 3]


def test_recall_by_hand():
    assert recall_from_scores(SCORES, TEXT_TO_IMAGE, ks=(1, 2, 9)) == pytest.approx(
        {
            "text_to_image_recall@1": 1 / 5,
            "text_to_image_recall@2": 3 / 5,
            "text_to_image_recall@9": 1.0,
            "image_to_text_recall@1": 2 / 3,
            "image_to_text_recall@2": 2 / 3,
            "image_to_text_recall@9": 1.0,
        }
    )


def test_hits_average_to_the_recall():
    ranks = ranks_from_scores(SCORES, TEXT_TO_IMAGE)
    for direction, hits in ranks.hits(2).items():
        assert hits.mean() == ranks.recall([2])[f"{direction}_recall@2"]


def test_one_score_for_every_pair_is_chance():
    text_to_image = np.repeat(np.arange(20), 5)
    recall = recall_from_scores(np.zeros((20, 100)), text_to_image, ks=(1,))
    assert recall == pytest.approx({"text_to_image_recall@1": 1 / 20, "image_to_text_recall@1": 1 / 20})


def test_pairs_that_were_not_scored_rank_last():
    scores = np.full((2, 3), -np.inf)
    scores[0, 2] = 1.0
    ranks = ranks_from_scores(scores, [0, 0, 1])
    # Of equals the lower index is first: image 0 meets text 2, then its own text 0; image 1 meets 0, 1, then its own.
    assert ranks.image_to_text.tolist() == [1, 2]
    assert ranks.text_to_image.tolist() == [0, 0, 1]


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.float16, torch.bfloat16])
def test_tensors_of_every_precision(dtype):
    image = torch.eye(8, dtype=dtype, requires_grad=True)
    recall = retrieval_recall(image, torch.eye(8, dtype=dtype), torch.arange(8), ks=(1,))
    assert recall == {"text_to_image_recall@1": 1.0, "image_to_text_recall@1": 1.0}


@pytest.mark.parametrize(
    ("image", "text", "text_to_image", "message"),
    [
        (np.ones((2, 4)), np.ones((2, 5)), [0, 1], "differ in width"),
        (np.ones(4), np.ones((2, 4)), [0, 1], "image must be a non-empty matrix"),
        (np.ones((2, 4)), np.ones((2, 4)), [0], "must hold 2 integers"),
        (np.ones((2, 4)), np.ones((2, 4)), [0.0, 1.0], "must hold 2 integers"),
        (np.ones((2, 4)), np.ones((2, 4)), [0, 2], "must point at images 0 to 1"),
        (np.ones((2, 4)), np.ones((2, 4)), [0, -1], "must point at images 0 to 1"),
        (np.ones((3, 4)), np.ones((2, 4)), [0, 0], "2 of 3 images have no text"),
        (np.full((2, 4), np.nan), np.ones((2, 4)), [0, 1], "NaN among the scores"),
    ],
)
def test_retrieval_refuses(image, text, text_to_image, message):
    with pytest.raises(ValueError, match=message):
        retrieval_recall(image, text, text_to_image)


def test_recall_refuses_k_zero():
    with pytest.raises(ValueError, match="k of at least 1"):
        recall_from_scores(SCORES, TEXT_TO_IMAGE, ks=(0,))


def test_vqa_accuracy_refuses_a_question_without_answers():
    with pytest.raises(ValueError, match="no ground-truth answers"):
        vqa_accuracy("yes", [])


def test_vqa_accuracy_leaves_its_input_alone():
    answers = ["The Cat.", "dog"] * 5
    vqa_accuracy("cat", answers)
    assert answers == ["The Cat.", "dog"] * 5


@pytest.mark.parametrize("kind", [list, np.array, torch.tensor])
def test_accuracy(kind):
    assert accuracy(kind([1, 2, 3, 4]), kind([1, 2, 0, 4])) == 0.75


def test_accuracy_refuses_shapes():
    with pytest.raises(ValueError, match="equal, non-empty shapes"):
        accuracy([1, 2, 3], [1, 2])
    with pytest.raises(ValueError, match="equal, non-empty shapes"):
        accuracy([], [])
