"""Scoring retrieval: two stages, ties, folds and the sample, by hand."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from benchmarks import ranking
from benchmarks.retrieval import (
    RECALL_AT,
    protocol,
    ranks_of_retrieved,
    retrieval_definitions,
    sample_comparison,
    score_retrieval,
)
from cvlm.data import Examples, PictureFile
from cvlm.errors import CvlmError
from cvlm.training import NONE, Candidates, Lists, RetrievalSettings, Retrieved, image_of_texts, make_folds
from cvlm.training import candidates as stage1
from cvlm.training.candidates import fold_candidates, fold_members, top_candidates

NAN, END = float("nan"), -np.inf

# Similarity, pictures x texts. Texts 0 and 1 belong to picture 0, text 2 to picture 1, text 3 to picture 2.
SIMILARITY = torch.tensor([[0.1, 0.9, 0.2, 0.3], [0.8, 0.2, 0.3, 0.4], [0.5, 0.1, 0.4, 0.6]])
IMAGE_OF = np.array([0, 0, 1, 2])


def examples(image_of: Any = IMAGE_OF, text_of: Any = None) -> Examples:
    image_of = np.asarray(image_of)
    text_of = np.arange(len(image_of)) if text_of is None else np.asarray(text_of)
    return Examples(
        name="by hand",
        split="test",
        pictures=[PictureFile(Path(f"{i}.png")) for i in range(image_of.max() + 1)],
        texts=tuple(f"text {i}" for i in range(text_of.max() + 1)),
        image_of=image_of,
        text_of=text_of,
        labels=image_of,
    )


def listed(candidate: Any, score: Any, query: Any = None) -> Candidates:
    candidate = np.asarray(candidate)
    query = np.arange(len(candidate)) if query is None else np.asarray(query)
    return Candidates(query=query, candidate=candidate, score=np.asarray(score, dtype=np.float32))


def retrieved(similarity: torch.Tensor = SIMILARITY, **others: Any) -> Retrieved:
    """Embeddings whose inner products are a given matrix."""
    return Retrieved(images=similarity, texts=torch.eye(similarity.shape[1]), **others)


def test_embeddings_alone() -> None:
    values, clusters = score_retrieval(examples(), retrieved())
    assert set(values) == {f"{way}_recall@{k}" for way in ("text_to_image", "image_to_text") for k in (1, 5, 10)}
    # Text 0 finds picture 0 last, text 1 first, text 2 second, text 3 first.
    assert values["text_to_image_recall@1"].tolist() == [0, 1, 0, 1]
    # Picture 0 finds text 1 first; picture 1 finds text 2 third; picture 2 finds text 3 first.
    assert values["image_to_text_recall@1"].tolist() == [1, 0, 1]
    assert values["text_to_image_recall@5"].tolist() == [1, 1, 1, 1]
    assert clusters["text_to_image_recall@1"].tolist() == [0, 0, 1, 2]
    assert clusters["image_to_text_recall@10"].tolist() == [0, 1, 2]


def test_five_is_not_one() -> None:
    n = 12
    similarity = torch.eye(n)
    similarity[0, 0] = -1  # eleven others stand above
    similarity[1, 1:8] = torch.linspace(0.3, 0.9, 7)  # six texts stand above
    values, _ = score_retrieval(examples(range(n)), retrieved(similarity))
    assert [values[f"image_to_text_recall@{k}"][:2].tolist() for k in RECALL_AT] == [[0, 0], [0, 0], [0, 1]]


def test_two_stages_by_hand() -> None:
    lists = Lists(
        # Text 0: its picture 0 is no candidate. Text 1: last of two. Text 2: first. Text 3: a tie with picture 1.
        text_to_image=listed([[1, 2], [0, 2], [1, 2], [2, 1]], [[5, 4], [-3, -2], [-2, -5], [7, 7]]),
        # Picture 0: text 1 is better than text 0, and second. Picture 1: text 2 is no candidate. Picture 2: alone.
        image_to_text=listed([[1, 0, 2], [0, 3, 1], [3, NONE, NONE]], [[0.5, 0.25, 1], [1, 2, 3], [-9, END, END]]),
    )
    ranks = ranks_of_retrieved(IMAGE_OF, retrieved(reranked=lists))
    assert ranks.text_to_image.tolist() == [2, 1, 0, 1]
    assert ranks.image_to_text.tolist() == [1, 3, 0]


def test_what_missed_the_list_keeps_its_rank_by_embeddings() -> None:
    similarity = torch.zeros(6, 6) + torch.arange(6.0)[:, None]  # every text finds the last picture first
    lists = Lists(
        text_to_image=listed([[4, 5]] * 6, [[0, 1]] * 6), image_to_text=listed([[i] for i in range(6)], [[0]] * 6)
    )
    ranks = ranks_of_retrieved(np.arange(6), retrieved(similarity, reranked=lists))
    assert ranks.text_to_image.tolist() == [5, 4, 3, 2, 1, 0]


def test_rounding_lifts_no_positive_over_the_list_that_it_missed() -> None:
    """By embeddings text 0 finds its picture first, and yet it is no candidate: two products that differ."""
    lists = Lists(text_to_image=listed([[1]] * 2, [[0]] * 2), image_to_text=listed([[0], [1]], [[0], [0]]))
    ranks = ranks_of_retrieved(np.arange(2), retrieved(torch.eye(2), reranked=lists))
    assert ranks.text_to_image.tolist() == [1, 0]


def test_close_and_extreme_match_scores_keep_their_order() -> None:
    lists = Lists(
        text_to_image=listed([[0], [0], [1], [2]], [[0]] * 4),
        image_to_text=listed([[2, 1], [0, 2], [0, 3]], [[-3e3, -2.9e3], [5.0001, 5.0002], [1e3, 1e3 + 0.001]]),
    )
    assert ranks_of_retrieved(IMAGE_OF, retrieved(reranked=lists)).image_to_text.tolist() == [0, 0, 0]


def test_a_broken_match_score_is_no_hit() -> None:
    lists = Lists(text_to_image=listed([[0]] * 4, [[NAN]] * 4), image_to_text=listed([[0]] * 3, [[0]] * 3))
    with pytest.raises(ValueError, match="NaN among the scores of query 0"):
        ranks_of_retrieved(IMAGE_OF, retrieved(reranked=lists))


def test_a_text_of_two_pictures_is_refused() -> None:
    with pytest.raises(CvlmError, match="the text 'text 1' stands with several pictures"):
        image_of_texts(examples([0, 1, 0, 2], [0, 1, 2, 1]))


def test_the_sample_compares_the_same_queries() -> None:
    full = SIMILARITY.numpy() * 10  # what the matching head would say about every pair
    full[0, 0] = 20  # text 0: the head finds picture 0, which stage 1 ranks last
    top = top_candidates(torch.eye(4), SIMILARITY, 1), top_candidates(SIMILARITY, torch.eye(4), 1)
    lists = Lists(
        text_to_image=listed(top[0], np.take_along_axis(full.T, top[0], 1)),
        image_to_text=listed(top[1], np.take_along_axis(full, top[1], 1)),
    )
    sample = Lists(
        text_to_image=listed([[0, 1, 2]] * 2, full.T[[0, 1]], [0, 1]),
        image_to_text=listed([[0, 1, 2, 3]] * 2, full[[0, 2]], [0, 2]),
    )
    found = sample_comparison(examples(), retrieved(reranked=lists, sample=sample))
    assert found is not None
    assert found["queries"] == 2
    assert found["two_stage"]["text_to_image_recall@1"] == 0.5
    assert found["exhaustive"]["text_to_image_recall@1"] == 1.0
    assert found["difference"]["text_to_image_recall@1"] == -0.5
    assert found["difference"]["image_to_text_recall@1"] == 0.0
    assert sample_comparison(examples(), retrieved()) is None


class TestTopCandidates:
    @pytest.mark.parametrize("block", [1, 100, 1 << 23])
    @pytest.mark.parametrize("integer", [False, True])
    def test_equals_a_full_sort_whatever_the_block(
        self, monkeypatch: pytest.MonkeyPatch, block: int, integer: bool
    ) -> None:
        monkeypatch.setattr(stage1, "BLOCK_SCORES", block)
        rng = np.random.default_rng(0)
        draw = (lambda shape: rng.integers(-1, 2, shape)) if integer else rng.standard_normal
        queries, candidates = draw((23, 4)), draw((41, 4))
        scores = queries @ candidates.T
        expected = np.argsort(-scores, axis=1, kind="stable")[:, :7]
        found = top_candidates(torch.tensor(queries), torch.tensor(candidates), 7)
        np.testing.assert_array_equal(np.sort(found), np.sort(expected))

    def test_all_of_them(self) -> None:
        assert top_candidates(torch.ones(2, 1), torch.ones(3, 1), 9).tolist() == [[0, 1, 2]] * 2


class TestFolds:
    # Seven pictures with 1, 2, 1, 2, 1, 2, 1 texts, the texts in disorder.
    IMAGE_OF = np.array([6, 0, 1, 5, 1, 2, 3, 3, 4, 5])

    def test_consecutive_pictures_the_first_folds_take_the_rest(self) -> None:
        folds = make_folds(self.IMAGE_OF, 3)
        assert [fold.pictures.tolist() for fold in folds] == [[0, 1, 2], [3, 4], [5, 6]]
        assert [fold.texts.tolist() for fold in folds] == [[1, 2, 4, 5], [6, 7, 8], [0, 3, 9]]

    @pytest.mark.parametrize("folds", [-1, 0, 4])
    def test_too_many_or_too_few(self, folds: int) -> None:
        with pytest.raises(CvlmError, match=rf"{folds} folds of 7 pictures: .* use 1 to 3 folds"):
            make_folds(self.IMAGE_OF, folds)

    def test_candidates_stay_in_the_fold(self) -> None:
        torch.manual_seed(0)
        images, texts, folds = torch.randn(7, 5), torch.randn(10, 5), make_folds(self.IMAGE_OF, 3)
        of_texts, of_images = fold_candidates(folds, images, texts, 2)
        assert (of_texts.shape, of_images.shape) == ((10, 2), (7, 2))
        everything = fold_candidates(folds, images, texts, None)
        assert (everything[0].shape, everything[1].shape) == ((10, 3), (7, 4))
        for fold in folds:
            assert set(of_texts[fold.texts].ravel()) <= set(fold.pictures)
            assert set(of_images[fold.pictures].ravel()) <= set(fold.texts)
            assert {*everything[1][fold.pictures].ravel()} - {NONE} == set(fold.texts)
        some = np.array([1, 3])
        assert fold_members(folds, some, of_texts=True).tolist() == [[0, 1, 2], [5, 6, NONE]]
        assert fold_members(folds, some, of_texts=False).tolist() == [[1, 2, 4, 5], [6, 7, 8, NONE]]

    def test_ranks_are_those_of_each_fold_alone(self) -> None:
        torch.manual_seed(1)
        images, texts = torch.randn(7, 5), torch.randn(10, 5)
        ranks = ranks_of_retrieved(self.IMAGE_OF, Retrieved(images=images, texts=texts, folds=3))
        for fold in make_folds(self.IMAGE_OF, 3):
            local = self.IMAGE_OF[fold.texts] - fold.pictures[0]
            alone = ranks_of_retrieved(local, Retrieved(images=images[fold.pictures], texts=texts[fold.texts]))
            np.testing.assert_array_equal(ranks.text_to_image[fold.texts], alone.text_to_image)
            np.testing.assert_array_equal(ranks.image_to_text[fold.pictures], alone.image_to_text)
        whole = ranks_of_retrieved(self.IMAGE_OF, Retrieved(images=images, texts=texts))
        assert (whole.text_to_image >= ranks.text_to_image).all()
        assert (whole.text_to_image > ranks.text_to_image).any()

    def test_the_result_names_them(self) -> None:
        data = examples(self.IMAGE_OF)
        assert protocol(data, 1)["name"] == "the whole split"
        assert protocol(data, 3) == {
            "name": "3 folds of 2 to 3 pictures, in the order of the data",
            "folds": 3,
            "pictures_per_fold": [2, 3],
            "texts_per_fold": [3, 4],
        }
        whole, folds = retrieval_definitions(), retrieval_definitions(5)
        assert whole["text_to_image_recall@1"].endswith("among the 1 best of the whole split")
        assert "its own fold, of 5 in the order of the data" in folds["image_to_text_recall@10"]


@pytest.mark.parametrize("settings", [{"rerank": -1}, {"rerank": "most"}, {"exhaustive_sample": -1}])
def test_settings_that_mean_nothing(settings: Any) -> None:
    ((name, value),) = settings.items()
    with pytest.raises(CvlmError, match=f"{name} is {value!r}; give a number"):
        RetrievalSettings(**settings)


def test_a_list_in_any_order_gives_the_rank_of_a_full_sort() -> None:
    rng = np.random.default_rng(2)
    score = rng.integers(0, 4, (50, 9)).astype(np.float32)  # many ties
    candidate = np.stack([rng.permutation(30)[:9] for _ in range(50)])
    positive = rng.random((50, 9)) < 0.3
    found = ranking.ranks_in_lists(candidate, score, positive, np.full(50, 20))
    for row in range(50):
        order = sorted(range(9), key=lambda i: (-score[row, i], candidate[row, i]))
        hits = [place for place, i in enumerate(order) if positive[row, i]]
        assert found[row] == (hits[0] if hits else 20)
