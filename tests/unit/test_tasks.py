"""Scores by hand: vqa, the majority answer, retrieval with and without re-ranking, and metrics.json."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from benchmarks.compare import compared_arms, metrics_json
from benchmarks.tasks import PRIMARY, RECALL_AT, Scores, majority, score
from cvlm.data import UNLABELLED, Examples, PictureFile
from cvlm.training import Prediction


def examples(*, texts: tuple[str, ...], image_of: Any, text_of: Any, labels: Any = None, pictures: int = 3) -> Examples:
    return Examples(
        name="by hand",
        split="test",
        pictures=[PictureFile(Path(f"{i}.png")) for i in range(pictures)],
        texts=texts,
        image_of=np.asarray(image_of),
        text_of=np.asarray(text_of),
        labels=np.asarray(image_of if labels is None else labels),
        answers=("yes", "no", "red"),
    )


def test_vqa_by_hand() -> None:
    data = examples(texts=("a?", "b?"), image_of=[0, 0, 1, 2], text_of=[0, 1, 0, 1], labels=[0, 1, 2, 1])
    logits = np.array([[2, 1, 0], [0, 1, 3], [-1, -2, 0.5], [0, 9, 8]], dtype=np.float32)
    scores = score("vqa", data, Prediction(logits=logits))
    assert scores.values["accuracy"].tolist() == [1, 0, 1, 1]
    assert scores.clusters["accuracy"].tolist() == [0, 0, 1, 2]


def test_the_majority_by_hand() -> None:
    hidden = UNLABELLED
    train = examples(
        texts=("a?", "b?", "c?"),
        image_of=[0, 0, 0, 1, 1, 2, 2, 2],
        text_of=[0, 0, 0, 1, 1, 1, 2, 2],
        labels=[0, 0, 2, 1, 1, 0, hidden, hidden],
    )
    # The test texts stand in another order; c? has no known answer, d? was never asked: both get "yes", 3 of 6.
    test = examples(
        texts=("d?", "b?", "a?", "c?"), image_of=[0, 1, 2, 2, 2], text_of=[1, 2, 0, 3, 0], labels=[1, 2, 0, 0, 1]
    )
    scores = majority(train, test)
    assert scores.values["accuracy"].tolist() == [1, 0, 1, 1, 0]
    assert scores.clusters["accuracy"].tolist() == [0, 1, 2, 2, 2]


# Similarity, pictures x texts. Texts 0 and 1 belong to picture 0, text 2 to picture 1, text 3 to picture 2.
SIMILARITY = torch.tensor([[0.1, 0.9, 0.2, 0.3], [0.8, 0.2, 0.3, 0.4], [0.5, 0.1, 0.4, 0.6]])
CAPTIONS = {"texts": ("p", "q", "r", "s"), "image_of": [0, 0, 1, 2], "text_of": [0, 1, 2, 3]}


def embeddings(similarity: torch.Tensor) -> dict[str, torch.Tensor]:
    """Vectors whose inner products are a given matrix."""
    return {"images": similarity, "texts": torch.eye(similarity.shape[1])}


def test_retrieval_by_hand() -> None:
    scores = score("retrieval", examples(**CAPTIONS), Prediction(**embeddings(SIMILARITY)))
    assert set(scores.values) == {f"{way}_recall@{k}" for way in ("text_to_image", "image_to_text") for k in (1, 5, 10)}
    # Text 0 finds picture 0 last, text 1 first, text 2 second, text 3 first.
    assert scores.values["text_to_image_recall@1"].tolist() == [0, 1, 0, 1]
    # Picture 0 finds text 1 first; picture 1 finds text 2 third; picture 2 finds text 3 first.
    assert scores.values["image_to_text_recall@1"].tolist() == [1, 0, 1]
    assert scores.values["text_to_image_recall@5"].tolist() == [1, 1, 1, 1]
    assert scores.clusters["text_to_image_recall@1"].tolist() == [0, 0, 1, 2]
    assert scores.clusters["image_to_text_recall@10"].tolist() == [0, 1, 2]


def test_five_is_not_one() -> None:
    n = 12
    similarity = torch.eye(n)
    similarity[0, 0] = -1  # eleven others stand above
    similarity[1, 1:8] = torch.linspace(0.3, 0.9, 7)  # six texts stand above
    data = examples(texts=tuple(map(str, range(n))), image_of=range(n), text_of=range(n), pictures=n)
    values = score("retrieval", data, Prediction(**embeddings(similarity))).values
    assert [values[f"image_to_text_recall@{k}"][:2].tolist() for k in RECALL_AT] == [[0, 0], [0, 0], [0, 1]]


def test_reranked_pairs_stand_above_all_others() -> None:
    none = -torch.inf
    rerank = torch.tensor([[none, -7.0, none, none], [-3.0, none, -2.0, none], [none, none, -5.0, none]])
    prediction = Prediction(**embeddings(SIMILARITY), rerank=rerank)
    values = score("retrieval", examples(**CAPTIONS), prediction).values
    # Text 0: only picture 1 was re-ranked, so it leads and picture 0 comes last by similarity. Text 1: picture 0 was
    # re-ranked. Text 2: picture 1 (-2) before picture 2 (-5). Text 3: nothing re-ranked, similarity decides.
    assert values["text_to_image_recall@1"].tolist() == [0, 1, 1, 1]
    # Picture 2: text 2 was re-ranked and leads, although its own text 3 is more similar.
    assert values["image_to_text_recall@1"].tolist() == [1, 1, 0]


def test_close_and_extreme_match_scores_keep_their_order() -> None:
    rerank = torch.full((3, 4), -torch.inf)
    rerank[0, 2], rerank[0, 1] = -3e3, -2.9e3
    rerank[1, 0], rerank[1, 2] = 5.0001, 5.0002  # closer than single precision tells apart at 20,000
    rerank[2, 0], rerank[2, 3] = 1e3, 1e3 + 0.001
    values = score("retrieval", examples(**CAPTIONS), Prediction(**embeddings(SIMILARITY), rerank=rerank)).values
    assert values["image_to_text_recall@1"].tolist() == [1, 1, 1]


def test_a_broken_match_score_is_no_hit() -> None:
    rerank = torch.full((3, 4), torch.nan)
    with pytest.raises(ValueError, match="NaN"):
        score("retrieval", examples(**CAPTIONS), Prediction(**embeddings(SIMILARITY), rerank=rerank))


def test_scores_survive_the_disk(tmp_path: Path) -> None:
    scores = score("retrieval", examples(**CAPTIONS), Prediction(**embeddings(SIMILARITY)))
    scores.save(tmp_path / "scores.npz")
    again = Scores.load(tmp_path / "scores.npz")
    assert [path.name for path in tmp_path.iterdir()] == ["scores.npz"]
    assert set(again.values) == set(scores.values)
    for name in scores.values:
        assert np.array_equal(again.values[name], scores.values[name])
        assert np.array_equal(again.clusters[name], scores.clusters[name])
        assert again.clusters[name].dtype == np.int64


def accuracy(rate: float, seed: int) -> Scores:
    values = (np.random.default_rng(seed).random(60) < rate).astype(np.float64)
    return Scores(values={"accuracy": values}, clusters={"accuracy": np.arange(60) // 3})


class TestMetricsJson:
    """As the plan of the house has it."""

    ARMS = (
        ("majority", [accuracy(0.3, 9)]),
        ("teacher", [accuracy(0.95, 8)]),
        ("finetune", [accuracy(0.4, seed) for seed in range(3)]),
        ("distill_logits", [accuracy(0.6, seed) for seed in range(10, 13)]),
        ("distill", [accuracy(0.8, seed) for seed in range(20, 23)]),
    )

    def test_the_format(self) -> None:
        arms = dict(self.ARMS)
        metrics = json.loads(json.dumps(metrics_json("vqa", "test", arms, compared_arms(list(arms)))))
        assert (metrics["task"], metrics["split"], metrics["n"]) == ("vqa", "test", 60)
        assert set(metrics["arms"]) == set(arms)
        for name, scores in arms.items():
            (summary,) = metrics["arms"][name].values()
            assert set(summary) == {"mean", "per_seed", "ci95"}
            assert summary["per_seed"] == pytest.approx([one.values["accuracy"].mean() for one in scores])
            assert summary["mean"] == pytest.approx(np.mean(summary["per_seed"]))
            low, high = summary["ci95"]
            assert low <= summary["mean"] <= high
        assert {"distill_vs_finetune", "distill_vs_teacher"} <= set(metrics["comparisons"])
        for entry in metrics["comparisons"].values():
            assert set(entry) == {"metric", "difference", "ci95", "p_value"}
            assert entry["metric"] == "accuracy"
        means = {name: metrics["arms"][name]["accuracy"]["mean"] for name in arms}
        entry = metrics["comparisons"]["distill_vs_finetune"]
        assert entry["difference"] == pytest.approx(means["distill"] - means["finetune"])
        assert metrics["verdict"].startswith("distill is higher than finetune in accuracy: ")
        assert metrics["verdict"] == metrics["verdicts"][0]
        assert len(metrics["verdicts"]) == len(metrics["comparisons"]) == 4

    def test_one_arm_is_compared_with_nothing(self) -> None:
        metrics = metrics_json("vqa", "test", {"finetune": [accuracy(0.4, 0)]}, compared_arms(["finetune"]))
        assert metrics["comparisons"] == {}
        assert metrics["verdict"] == "nothing was compared"

    def test_retrieval_is_judged_by_one_metric_and_shows_all(self) -> None:
        data = examples(**CAPTIONS)
        good = score("retrieval", data, Prediction(**embeddings(SIMILARITY)))
        bad = score("retrieval", data, Prediction(**embeddings(-SIMILARITY)))
        metrics = metrics_json("retrieval", "test", {"finetune": [bad], "distill": [good]}, [("distill", "finetune")])
        assert metrics["metric"] == PRIMARY["retrieval"]
        assert metrics["n"] == 4
        assert len(metrics["arms"]["distill"]) == 6
        assert metrics["comparisons"]["distill_vs_finetune"]["metric"] == PRIMARY["retrieval"]


def test_which_arms_are_compared() -> None:
    arms = ["majority", "teacher", "finetune", "logits", "distill"]
    assert compared_arms(arms) == [
        ("distill", "finetune"),
        ("logits", "finetune"),
        ("distill", "logits"),
        ("distill", "teacher"),
    ]
    assert compared_arms(["finetune", "distill"]) == [("distill", "finetune")]
    assert compared_arms(["teacher", "finetune"]) == []
    assert compared_arms(["a", "b"]) == [("b", "a")]


def test_a_verdict_from_one_seed_says_so() -> None:
    rng = np.random.default_rng(0)

    def scores() -> Scores:
        return Scores(values={"accuracy": rng.random(40)}, clusters={"accuracy": np.arange(40)})

    single = metrics_json("vqa", "test", {"finetune": [scores()], "distill": [scores()]}, [("distill", "finetune")])
    assert single["verdict"].endswith("leaves out how much training varies")
    several = {"finetune": [scores(), scores()], "distill": [scores(), scores()]}
    assert "leaves out" not in metrics_json("vqa", "test", several, [("distill", "finetune")])["verdict"]
