"""Tasks that answer, beyond vqa: scores by hand, what the bootstrap resamples, and the majority baseline."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from data_files import write_nlvr2, write_snli_ve

from benchmarks.free_answers import score_free_answers
from benchmarks.tasks import consistency, majority, score, two_picture_accuracy
from cvlm.config import ShardsData
from cvlm.data import Examples, PictureFile, Splits, load_data
from cvlm.data.importing import ImportSettings, import_data
from cvlm.data.matching import matching_pairs
from cvlm.errors import CvlmError
from cvlm.tasks import TASKS
from cvlm.training import Prediction


def examples(
    task: str, *, image_of: Any, text_of: Any, labels: Any, texts: tuple[str, ...] = ("a", "b", "c")
) -> Examples:
    image_of = np.asarray(image_of)
    return Examples(
        name="by hand",
        split="test",
        pictures=[PictureFile(Path(f"{i}.png")) for i in range(int(image_of.max()) + 1)],
        texts=texts,
        image_of=image_of,
        text_of=np.asarray(text_of),
        labels=np.asarray(labels),
        answers=TASKS[task].answers,
    )


def chosen(answers: list[int], number: int) -> Prediction:
    return Prediction(logits=np.eye(number, dtype=np.float32)[answers])


def test_nlvr2_by_hand() -> None:
    data = examples(
        "nlvr2",
        image_of=[[0, 1], [2, 3], [0, 1], [4, 5], [2, 3]],
        text_of=[0, 0, 1, 1, 2],
        labels=[0, 1, 0, 0, 1],
    )
    scores = score("nlvr2", data, chosen([0, 1, 0, 1, 1], 2))
    assert scores.values["accuracy"].tolist() == [1, 1, 1, 0, 1]
    assert scores.clusters["accuracy"].tolist() == [0, 0, 1, 1, 2], "statements are resampled"
    assert scores.values["consistency"].tolist() == [1, 0, 1]
    assert scores.clusters["consistency"].tolist() == [0, 1, 2]


def test_consistency_needs_every_pair() -> None:
    values, statements = consistency(np.array([1.0, 1, 0, 1, 1, 0]), np.array([7, 2, 2, 7, 4, 9]))
    assert dict(zip(statements.tolist(), values.tolist(), strict=True)) == {2: 0.0, 4: 1.0, 7: 1.0, 9: 0.0}


def test_snli_ve_by_hand() -> None:
    data = examples("snli_ve", image_of=[0, 0, 1, 2], text_of=[0, 1, 2, 0], labels=[0, 1, 2, 2])
    scores = score("snli_ve", data, chosen([0, 2, 2, 0], 3))
    assert {name: values.tolist() for name, values in scores.values.items()} == {"accuracy": [1, 0, 1, 0]}
    assert scores.clusters["accuracy"].tolist() == [0, 0, 1, 2], "pictures are resampled"


def test_itm_by_hand() -> None:
    captions = examples("itm", image_of=[0, 1, 2], text_of=[0, 1, 2], labels=[0, 1, 2])
    data = matching_pairs(captions)
    # Margins of yes over no: right pictures 2, -1, 0.5; wrong pictures 1, -3, 0.5.
    logits = np.array([[0, 2], [1, 0], [0, 0.5], [0, 1], [3, 0], [1, 1.5]], dtype=np.float32)
    scores = score("itm", data, Prediction(logits=logits))
    assert scores.values["accuracy"].tolist() == [1, 0, 1, 0, 1, 0]
    assert scores.values["two_picture_accuracy"].tolist() == [1, 1, 0.5]
    assert scores.clusters["accuracy"].tolist() == data.image_of.tolist()
    assert scores.clusters["two_picture_accuracy"].tolist() == [0, 1, 2]


def test_two_picture_accuracy_of_a_model_that_ignores_the_picture_is_chance() -> None:
    text_alone = np.random.default_rng(0).standard_normal((20, 2)).astype(np.float32)
    assert two_picture_accuracy(np.tile(text_alone, (2, 1))).tolist() == [0.5] * 20


def test_the_majority_of_nlvr2_goes_by_statement() -> None:
    train = examples("nlvr2", image_of=[[0, 1]] * 5, text_of=[0, 0, 0, 1, 2], labels=[1, 1, 0, 0, 0])
    test = examples("nlvr2", image_of=[[0, 1]] * 3, text_of=[0, 1, 2], labels=[1, 0, 1], texts=("a", "b", "new"))
    scores = majority(train, test)
    assert scores.values["accuracy"].tolist() == [1, 1, 0], "'new' gets the overall majority, true"
    assert scores.clusters["accuracy"].tolist() == [0, 1, 2]
    assert scores.values["consistency"].tolist() == [1, 1, 0]


PEOPLE = (("true",) * 10, ("false",) * 10, ("true",) * 10)


def test_every_result_of_nlvr2_has_both_metrics() -> None:
    """Our models, answers in words, whatever labels the data has, and the baseline."""
    data = examples("nlvr2", image_of=[[0, 1], [2, 3], [0, 2]], text_of=[0, 0, 1], labels=[0, 1, 0])
    train = examples("nlvr2", image_of=[[0, 1]] * 3, text_of=[0, 1, 2], labels=[0, 0, 0])
    words = ["True", "true", " true"]
    for scores in (
        score("nlvr2", data, chosen([0, 0, 0], 2)),
        score_free_answers("nlvr2", data, words),
        score_free_answers("nlvr2", replace(data, truths=("true", "false", "true")), words),
        score_free_answers("nlvr2", replace(data, references=PEOPLE), ["true"] * 3),
        majority(train, data),
    ):
        assert {name: values.tolist() for name, values in scores.values.items()} == {
            "accuracy": [1, 0, 1],
            "consistency": [0, 1],
        }
        assert {name: units.tolist() for name, units in scores.clusters.items()} == {
            "accuracy": [0, 0, 1],
            "consistency": [0, 1],
        }


def test_the_majority_of_matching_is_at_chance_over_two_pictures() -> None:
    train = matching_pairs(examples("itm", image_of=[0, 1, 2], text_of=[0, 1, 2], labels=[0, 1, 2]))
    scores = majority(train, train)
    assert scores.values["accuracy"].mean() == 0.5
    assert scores.values["two_picture_accuracy"].tolist() == [0.5] * 3
    assert scores.clusters["two_picture_accuracy"].tolist() == [0, 1, 2]


@pytest.mark.parametrize(
    "changed",
    [
        {"labels": np.array([0, 1, 1, 0])},  # not first the right pictures, then the wrong ones
        {"text_of": np.array([0, 1, 1, 0])},  # not the same captions twice
        {"answers": ("never", "always")},  # questions of another task
    ],
)
def test_two_pictures_need_the_order_of_matching_pairs(changed: dict[str, Any]) -> None:
    captions = examples("itm", image_of=[0, 1], text_of=[0, 1], labels=[0, 1], texts=("a", "b"))
    data = matching_pairs(captions)
    assert set(score("itm", data, chosen([1, 1, 0, 0], 2)).values) == {"accuracy", "two_picture_accuracy"}
    assert set(score("itm", replace(data, **changed), chosen([1, 1, 0, 0], 2)).values) == {"accuracy"}


def test_words_without_an_answer_list_are_wrong_outside_the_vocabulary() -> None:
    data = examples("vqa", image_of=[0, 1, 2], text_of=[0, 1, 2], labels=[0, 1, 1])
    data = replace(data, answers=("red", "blue"))
    assert score_free_answers("vqa", data, ["red", "Blue", "teal"]).values["accuracy"].tolist() == [1, 0, 0]


def test_limit_keeps_pairs_of_pictures_together() -> None:
    data = examples("nlvr2", image_of=[[4, 2], [2, 0], [1, 3]], text_of=[1, 0, 2], labels=[0, 1, 1])
    cut = data.limit(2)
    assert cut.image_of.tolist() == [[2, 1], [1, 0]]
    assert [picture.path.name for picture in cut.pictures] == ["0.png", "2.png", "4.png"]  # type: ignore[attr-defined]
    assert (cut.texts, cut.text_of.tolist(), cut.labels.tolist()) == (("a", "b"), [1, 0], [0, 1])


def imported(data_format: str, src: Path, out: Path, **spec: Any) -> Splits:
    index = import_data(data_format, src, out, ImportSettings(workers=1))
    return load_data(ShardsData(kind="shards", path=out, **spec), index.task)


class TestShards:
    def test_nlvr2(self, tmp_path: Path) -> None:
        data = imported("nlvr2", write_nlvr2(tmp_path / "src"), tmp_path / "out", limit=3).test
        assert data.image_of.tolist() == [[0, 1], [0, 1], [2, 3]]
        assert data.answers == TASKS["nlvr2"].answers
        assert data.labels.tolist() == [0, 1, 0]
        assert data.texts == ("One is red.", "Both are.", "One is red.")

    def test_a_statement_is_one_over_the_pairs_of_its_set(self, tmp_path: Path) -> None:
        """Identifiers SPLIT-SET-PAIR-SENTENCE: PAIR says which pictures, not which statement."""
        src = write_nlvr2(tmp_path / "src")
        for path in src.rglob("*test1*"):  # three sets of one pair become one set of three pairs
            if path.suffix == ".png":
                _, pair, _, side = path.stem.split("-")
                path.rename(path.with_name(f"test1-7-{int(pair) - 10}-{side}.png"))
        lines = (src / "test1.json").read_text()
        for pair in range(3):
            lines = lines.replace(f"test1-{pair + 10}-0-", f"test1-7-{pair}-")
        (src / "test1.json").write_text(lines)
        data = imported("nlvr2", src, tmp_path / "out").test
        assert data.image_of.tolist() == [[0, 1], [0, 1], [2, 3], [2, 3], [4, 5], [4, 5]]
        assert data.texts == ("One is red.", "Both are.")
        assert data.text_of.tolist() == data.unit_of.tolist() == [0, 1] * 3

    def test_snli_ve(self, tmp_path: Path) -> None:
        data = imported("snli_ve", write_snli_ve(tmp_path / "src"), tmp_path / "out").test
        assert data.image_of.tolist() == data.unit_of.tolist() == [0, 0, 0, 1, 1, 1, 2, 2, 2, 3, 3, 3]
        assert data.answers == TASKS["snli_ve"].answers
        assert data.labels.tolist() == [0, 1, 2] * 4

    def test_one_task_is_not_another(self, tmp_path: Path) -> None:
        imported("snli_ve", write_snli_ve(tmp_path / "src"), tmp_path / "out")
        with pytest.raises(CvlmError, match="was imported for task 'snli_ve', not 'nlvr2'"):
            load_data(ShardsData(kind="shards", path=tmp_path / "out"), "nlvr2")
