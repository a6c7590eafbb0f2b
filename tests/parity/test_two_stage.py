"""Retrieval in two stages against a plain loop over all pairs, and without a matrix of all pairs in memory."""

import tracemalloc
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from benchmarks import ranking
from benchmarks.metrics import ranks_from_scores
from benchmarks.retrieval import ranks_of_retrieved, sample_comparison
from benchmarks.runner import evaluate
from cvlm.config import StudentSpec
from cvlm.data import Examples, PictureFile, StoredTokens
from cvlm.errors import CvlmError
from cvlm.model import CVLM, compose
from cvlm.training import ModelInputs, RetrievalSettings, Retrieved, image_of_texts, model_inputs, predict
from cvlm.training import candidates as stage1
from distill.layout import ImageLayout

Make = Callable[..., StudentSpec]
WORDS = ("which", "colour", "is", "it", "what", "this", "whole", "picture", "of", "the")
TEXTS_OF_PICTURE = (2, 1, 3, 2, 1, 2, 1)


@pytest.fixture
def captions(paint: Callable[..., PictureFile]) -> Examples:
    """Seven pictures with one to three texts of one to twelve words each, the texts in disorder."""
    rng = np.random.default_rng(3)
    image_of = rng.permutation(np.repeat(np.arange(7), TEXTS_OF_PICTURE))
    texts = [" ".join(rng.choice(WORDS, rng.integers(1, 13))) for _ in image_of]
    return Examples(
        name="captions",
        split="test",
        pictures=[paint(f"c{i}", tuple(rng.integers(0, 256, 3)), seed=i) for i in range(7)],
        texts=tuple(texts),
        image_of=image_of,
        text_of=np.arange(len(texts)),
        labels=image_of,
    )


def build(spec: StudentSpec) -> CVLM:
    torch.manual_seed(4)
    model = compose(spec, task="retrieval").eval()
    assert model.matching_head is not None
    with torch.no_grad():
        for part in (model.matching_head.layers[-1], model.fusion.text_norm):
            part.weight *= 20  # type: ignore[operator]  # match scores that differ by more than rounding
    return model


def plain_scores(model: CVLM, data: Examples) -> torch.Tensor:
    """Every pair alone, with nothing computed before: `[pictures, texts]`."""
    scores = torch.empty(len(data.pictures), len(data.texts), dtype=torch.float64)
    with torch.no_grad():
        for i, picture in enumerate(data.pictures):
            image = model.vision.prepare([picture.load()])  # type: ignore[operator]
            for t, words in enumerate(data.texts):
                text = model.text.prepare([words])  # type: ignore[operator]
                scores[i, t] = model.match(image, text) + model(image, text).similarity[0, 0]
    return scores


def retrieve(model: CVLM, data: Examples, store: Path | None, **settings: Any) -> Retrieved:
    inputs = model_inputs(model, data, store)
    found = predict(model, inputs, retrieval=RetrievalSettings(**settings), batch_size=5).retrieved
    assert found is not None
    return found


@pytest.mark.parametrize("stored", [True, False])
@pytest.mark.parametrize("kind", ["co_attention", "cross", "merged"])
@pytest.mark.parametrize("rerank", ["all", 99])
def test_all_candidates_give_the_exhaustive_ranking(
    tiny_spec: Make, captions: Examples, tmp_path: Path, kind: str, stored: bool, rerank: Any
) -> None:
    model = build(tiny_spec(kind))
    full = plain_scores(model, captions)
    found = retrieve(model, captions, tmp_path / "store" if stored else None, rerank=rerank)
    assert found.reranked is not None
    order = found.reranked.text_to_image.candidate.argsort(1)
    scores = torch.from_numpy(np.take_along_axis(found.reranked.text_to_image.score, order, 1))
    torch.testing.assert_close(scores, full.T.float(), rtol=1e-4, atol=1e-4)
    image_of = image_of_texts(captions)
    ranks, expected = ranks_of_retrieved(image_of, found), ranks_from_scores(full, image_of)
    np.testing.assert_array_equal(ranks.text_to_image, expected.text_to_image)
    np.testing.assert_array_equal(ranks.image_to_text, expected.image_to_text)
    assert len(np.unique(expected.text_to_image)) > 3, "the model ranks as if at random"


@pytest.mark.parametrize("k", [1, 3])
def test_a_query_reorders_its_own_candidates_only(tiny_spec: Make, captions: Examples, tmp_path: Path, k: int) -> None:
    model = build(tiny_spec("cross"))
    full, found = plain_scores(model, captions).numpy(), retrieve(model, captions, tmp_path, rerank=k)
    similarity = (found.images @ found.texts.T).numpy()
    image_of = image_of_texts(captions)
    ranks = ranks_of_retrieved(image_of, found)

    def ranking_of(match: np.ndarray, cosine: np.ndarray) -> list[int]:
        first = np.argsort(-cosine, kind="stable")
        return [*sorted(first[:k], key=lambda i: -match[i]), *first[k:]]

    for text, image in enumerate(image_of):
        assert ranking_of(full[:, text], similarity[:, text]).index(image) == ranks.text_to_image[text]
    for image in range(7):
        places = ranking_of(full[image], similarity[image])
        assert min(places.index(t) for t in np.flatnonzero(image_of == image)) == ranks.image_to_text[image]


def test_folds_are_ranked_as_data_of_their_own(tiny_spec: Make, captions: Examples, tmp_path: Path) -> None:
    model = build(tiny_spec("cross"))
    image_of = image_of_texts(captions)
    full = plain_scores(model, captions).numpy()
    ranks = ranks_of_retrieved(image_of, retrieve(model, captions, tmp_path, rerank="all", folds=3))
    for pictures in ([0, 1, 2], [3, 4], [5, 6]):
        texts = np.flatnonzero(np.isin(image_of, pictures))
        alone = ranks_from_scores(full[np.ix_(pictures, texts)], image_of[texts] - pictures[0])
        np.testing.assert_array_equal(ranks.text_to_image[texts], alone.text_to_image)
        np.testing.assert_array_equal(ranks.image_to_text[pictures], alone.image_to_text)


def test_the_sample_is_ranked_exhaustively(tiny_spec: Make, captions: Examples, tmp_path: Path) -> None:
    model = build(tiny_spec("co_attention"))
    image_of = image_of_texts(captions)
    expected = ranks_from_scores(plain_scores(model, captions), image_of)
    found = retrieve(model, captions, tmp_path, rerank=1, exhaustive_sample=4)
    assert found.sample is not None
    result = sample_comparison(captions, found)
    assert result is not None
    assert result["queries"] == 4
    for direction in ("text_to_image", "image_to_text"):
        query = getattr(found.sample, direction).query
        assert len(np.unique(query)) == 4
        for k in (1, 5):
            hits = getattr(expected, direction)[query] < k
            assert result["exhaustive"][f"{direction}_recall@{k}"] == hits.mean()
    again = retrieve(model, captions, tmp_path, rerank=2, exhaustive_sample=4).sample
    assert again is not None
    np.testing.assert_array_equal(again.text_to_image.query, found.sample.text_to_image.query)


def test_the_result_file(tiny_spec: Make, captions: Examples) -> None:
    model = build(tiny_spec("cross"))
    result = evaluate(model, data=captions, rerank=2, folds=2)
    assert result["protocol"]["name"] == "2 folds of 3 to 4 pictures, in the order of the data"
    sample = result["exhaustive_sample"]
    assert sample["queries"] == 7, "more were asked for than there are"
    assert set(sample["difference"]) == set(result["metrics"])
    whole = {name: metric["mean"] for name, metric in result["metrics"].items()}
    assert sample["two_stage"]["image_to_text_recall@1"] == whole["image_to_text_recall@1"], "all pictures are in it"
    assert evaluate(model, data=captions, exhaustive_sample=0)["exhaustive_sample"] is None
    exhaustive = evaluate(model, data=captions, rerank="all", folds=2)
    assert exhaustive["exhaustive_sample"] is None
    for k in (1, 5):
        name = f"image_to_text_recall@{k}"
        assert sample["exhaustive"][name] == exhaustive["metrics"][name]["mean"]
    with pytest.raises(CvlmError, match="4 folds of 7 pictures"):
        evaluate(model, data=captions, folds=4)


class LargestTensor(TorchDispatchMode):
    """Keeps the size of the largest tensor that any operation makes."""

    elements = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        for tensor in result if isinstance(result, tuple | list) else (result,):
            if isinstance(tensor, torch.Tensor):
                self.elements = max(self.elements, tensor.numel())
        return result


def test_no_matrix_of_all_pairs_in_memory(tiny_spec: Make, monkeypatch: pytest.MonkeyPatch) -> None:
    n_image, n_text = 1000, 2000
    for module in (stage1, ranking):
        monkeypatch.setattr(module, "BLOCK_SCORES", 1 << 15)
    rng = np.random.default_rng(0)

    def stored(n: int, width: int) -> StoredTokens:
        tokens = rng.standard_normal((n, 1, width), dtype=np.float32)
        return StoredTokens(
            tokens=tokens, mask=np.ones((n, 1), bool), pooled=tokens[:, 0], spans=None, image_layout=LAYOUT, key=""
        )

    model = build(tiny_spec("cross"))
    image_of = np.arange(n_text) % n_image
    data = Examples(
        name="many",
        split="test",
        pictures=[PictureFile(Path("none.png"))] * n_image,
        texts=tuple(map(str, range(n_text))),
        image_of=image_of,
        text_of=np.arange(n_text),
        labels=image_of,
    )
    inputs = ModelInputs(examples=data, image=stored(n_image, 64), text=stored(n_text, 40))
    model.eval()
    tracemalloc.start()
    with LargestTensor() as largest:
        found = predict(model, inputs, retrieval=RetrievalSettings(rerank=4)).retrieved
        assert found is not None
        ranks_of_retrieved(image_of, found)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert largest.elements < n_image * n_text / 8
    assert peak < n_image * n_text * 4 / 2, "numpy's arrays, in bytes"


LAYOUT = ImageLayout(grid=(1, 1), special=0)
