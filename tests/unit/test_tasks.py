"""Scores by hand: vqa, the majority answer, retrieval with and without re-ranking, and metrics.json."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from benchmarks.compare import compared_arms, metrics_json
from benchmarks.tasks import PRIMARY, Scores, majority, score
from cvlm.data import UNLABELLED, Examples, PictureFile
from cvlm.training import Prediction, Retrieved


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


def retrieved(similarity: torch.Tensor) -> Prediction:
    """Embeddings whose inner products are a given matrix."""
    return Prediction(retrieved=Retrieved(images=similarity, texts=torch.eye(similarity.shape[1])))


def test_scores_survive_the_disk(tmp_path: Path) -> None:
    scores = score("retrieval", examples(**CAPTIONS), retrieved(SIMILARITY))
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
        good = score("retrieval", data, retrieved(SIMILARITY))
        bad = score("retrieval", data, retrieved(-SIMILARITY))
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
