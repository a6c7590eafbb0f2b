"""NLVR2 accuracy and consistency against the rule of the official script, on its own file format."""

import numpy as np
import pytest
from data_files import write_lines, write_picture

from benchmarks.tasks import score
from cvlm.config import ShardsData
from cvlm.data import load_data
from cvlm.data.importing import ImportSettings, import_data
from cvlm.training import Prediction

WORDINGS = ("There are two dogs.", "One is red.", "Both are blue.")


def official(rows, predicted):
    """Return precision and consistency by identifier: a statement's name is SPLIT-SET--SENTENCE, without the pair."""
    right, consistent = 0, {}
    for row in rows:
        split, number, _, sentence = row["identifier"].split("-")
        good = predicted[row["identifier"]].lower() == row["label"].lower()
        right += good
        name = f"{split}-{number}--{sentence}"
        consistent[name] = consistent.get(name, True) and good
    return right / len(rows), sum(consistent.values()) / len(consistent)


@pytest.fixture(scope="module")
def imported(tmp_path_factory):
    """Sets of one to four pairs, each with one to three statements; few wordings, so that sets share them."""
    folder = tmp_path_factory.mktemp("nlvr2")
    dice = np.random.default_rng(3)
    rows = {"train": [], "dev": []}
    for split, found in rows.items():
        for number in range(40 if split == "dev" else 1):
            wordings = dice.choice(WORDINGS, dice.integers(1, 4), replace=False)
            for pair in range(dice.integers(1, 5)):
                for side in (0, 1):
                    write_picture(folder / "src" / split / f"{split}-{number}-{pair}-img{side}.png", len(found) + side)
                for sentence, text in enumerate(wordings):
                    name = f"{split}-{number}-{pair}-{sentence}"
                    found.append({"identifier": name, "sentence": text, "label": str(bool(dice.integers(2)))})
        dice.shuffle(found)
        write_lines(folder / "src" / f"{split}.json", found)
    import_data("nlvr2", folder / "src", folder / "out", ImportSettings(workers=1))
    return rows["dev"], load_data(ShardsData(kind="shards", path=folder / "out"), "nlvr2").test


@pytest.mark.parametrize("error", [0.0, 0.1, 0.3, 0.5, 1.0])
def test_equals_the_official_rule(imported, error):
    rows, data = imported
    assert len(data) == len(rows)
    assert len(data.texts) > 2 * len(WORDINGS), "wordings recur in other sets"
    dice = np.random.default_rng(round(10 * error))
    wrong = dice.random(len(data)) < error
    answers = np.where(wrong, 1 - data.labels, data.labels)
    predicted = {name: data.answers[answer] for name, answer in zip(data.ids, answers, strict=True)}
    values = score("nlvr2", data, Prediction(logits=np.eye(2, dtype=np.float32)[answers])).values
    accuracy, consistency = official(rows, predicted)
    assert values["accuracy"].mean() == pytest.approx(accuracy, abs=1e-12)
    assert values["consistency"].mean() == pytest.approx(consistency, abs=1e-12)
    if 0 < error < 1:
        assert consistency < accuracy
