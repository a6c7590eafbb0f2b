"""Caption metrics: pycocoevalcap's numbers, values per picture with the right spread, tokens, what is left out."""

import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from pycocoevalcap.bleu.bleu import Bleu

from benchmarks import captions as metrics
from benchmarks.caption_tokens import has_java, official_tokens, simple_tokens
from benchmarks.captions import bleu_values, caption_definitions, caption_values, values_of_tokens
from benchmarks.tasks import majority, score
from cvlm.data import Examples, PictureFile, Splits
from cvlm.data.captions import caption_splits
from cvlm.errors import CvlmError
from cvlm.training import Prediction

# What Stanford's PTBTokenizer makes of these, punctuation dropped as the official evaluation does.
OFFICIAL = {
    "A man riding a horse.": "a man riding a horse",
    "A man's dog, isn't it? It's": "a man 's dog is n't it it 's",
    "don't can't won't I'm they're cannot gonna": "do n't ca n't wo n't i 'm they 're can not gon na",
    "3.5 feet by 1,000 in U.S. and Mr. Smith": "3.5 feet by 1,000 in u.s. and mr. smith",
    "a \"quoted\" 'single' word": "a quoted single word",
    "a (big) [red] thing": "a -lrb- big -rrb- -lsb- red -rsb- thing",
    "well-known semi-truck -- and - dash...": "well-known semi-truck and dash",
    "50% of $5, black/white; #1": "50 % of $ 5 black/white # 1",
    "a\u2019s caf\u00e9 \u2014 na\u00efve": "a 's caf\u00e9 na\u00efve",
    "at 8:30 a.m. a 10-foot pole": "at 8:30 a.m. a 10-foot pole",
    "women's cats' dogs": "women 's cats dogs",
    "five o'clock o\u2019clock": "five o'clock o\u2019clock",
    "   spaced   out  ": "spaced out",
    "": "",
    "what?! +1, thumb": "what ?! +1 thumb",
}


def test_tokens_of_ordinary_captions() -> None:
    assert {caption: simple_tokens(caption) for caption in OFFICIAL} == OFFICIAL


@pytest.mark.skipif(not has_java(), reason="the official tokenizer needs Java")
def test_the_official_tokenizer_says_so() -> None:
    assert official_tokens(list(OFFICIAL)) == list(OFFICIAL.values())
    assert official_tokens(["one\u2028two", "three"]) == ["one two", "three"]


def sentences(number: int, seed: int = 0) -> tuple[list[str], list[list[str]]]:
    """Captions that share most words with one of their references."""
    rng = np.random.default_rng(seed)
    words = [f"w{i}" for i in range(12)]
    references = [
        [" ".join(rng.choice(words, rng.integers(4, 9))) for _ in range(rng.integers(1, 4))] for _ in range(number)
    ]
    said = []
    for truths in references:
        caption = truths[-1].split()[: rng.integers(3, 9)]
        caption[rng.integers(len(caption))] = str(rng.choice(words))
        said.append(" ".join(caption))
    return said, references


def corpus_bleu(said: list[str], references: list[list[str]]) -> list[float]:
    given = dict(enumerate(references))
    return list(Bleu(4).compute_score(given, {i: [one] for i, one in enumerate(said)}, verbose=0)[0])


@pytest.mark.parametrize("extra", [0, 3])
def test_bleu_is_the_corpus_score_and_its_spread_that_of_resampled_corpora(extra: int) -> None:
    said, references = sentences(60)
    said = [f"{one} w1 w2 w3" if extra else one for one in said]  # too short as a corpus, then too long
    values = bleu_values(said, references)
    whole = corpus_bleu(said, references)
    rng = np.random.default_rng(1)
    picks = [rng.integers(0, 60, 60) for _ in range(150)]
    drawn = np.array([corpus_bleu([said[i] for i in pick], [references[i] for i in pick]) for pick in picks])
    for k in range(4):
        mine = values[f"bleu_{k + 1}"]
        assert mine.mean() == pytest.approx(whole[k], rel=1e-9)
        assert np.array([mine[pick].mean() for pick in picks]).std() == pytest.approx(drawn[:, k].std(), rel=0.1)
        together = np.corrcoef([mine[pick].mean() for pick in picks], drawn[:, k])[0, 1]
        assert together > 0.97


def test_no_four_words_in_common() -> None:
    values = bleu_values(["a b c", "d e"], [["a b x", "b c"], ["e d"]])
    assert values["bleu_1"].mean() == pytest.approx(5 / 5)
    assert values["bleu_4"].tolist() == pytest.approx([0, 0], abs=1e-3)
    assert np.isfinite(np.concatenate(list(values.values()))).all()
    assert np.isfinite(np.concatenate(list(bleu_values(["", ""], [["a"], ["b c"]]).values()))).all()


def test_perfect_captions(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(metrics, "has_java", lambda: False)
    truths = ["A big red car.", "two small blue boats", "nothing is here at all"]
    values = caption_values(truths, [[truth, truth.lower()] for truth in truths])
    assert values["cider"].tolist() == pytest.approx([10.0] * 3)
    for name in ("rouge_l", "bleu_1", "bleu_4"):
        assert values[name].tolist() == pytest.approx([1.0] * 3, abs=1e-6)


def test_rouge_by_hand() -> None:
    # In common with the references: 2 words of 2, and 3 of 4. Precision (of 5) and recall each take the better one.
    values = values_of_tokens(["a b c d e", "x"], [["a c", "b d e f"], ["y"]])
    precision, recall = 3 / 5, 1.0
    assert values["rouge_l"].tolist() == pytest.approx(
        [(1 + 1.44) * precision * recall / (recall + 1.44 * precision), 0]
    )


@pytest.mark.parametrize(("said", "given"), [(["a"], []), ([], []), (["a", "b"], [["a"], []])])
def test_what_cannot_be_scored(said: list[str], given: list[list[str]]) -> None:
    with pytest.raises(ValueError, match="captions need as many lists of references"):
        caption_values(said, given)


def test_without_the_package(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(metrics, "find_spec", lambda name: None)
    with pytest.raises(CvlmError, match=r"pip install 'cvlm\[caption\]'"):
        caption_values(["a"], [["a"]])


class TestJava:
    """METEOR and SPICE are left out with a reason, whatever stands in their way."""

    @pytest.fixture(autouse=True)
    def _forget(self) -> None:
        metrics._note.cache_clear()

    def test_no_java(self, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> None:
        monkeypatch.setattr(metrics, "has_java", lambda: False)
        found = caption_values(["a b", "c"], [["a b"], ["d"]], java=True)
        assert "meteor" not in found
        assert "spice" not in found
        assert "they need Java" in caplog.text
        assert "simple_tokens" in caption_definitions()["cider"]

    def test_a_java_that_fails(
        self, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture, tmp_path: Path
    ) -> None:
        (tmp_path / "java").write_text(f"#!{sys.executable}\nraise SystemExit(3)\n")
        (tmp_path / "java").chmod(0o755)
        monkeypatch.setenv("PATH", str(tmp_path))
        assert metrics._java_values(["a b", "c"], [["a b"], ["d"]]) == {}
        assert "METEOR is left out: its program stopped" in caplog.text
        assert "SPICE is left out: its language models are missing" in caplog.text
        with pytest.raises(CvlmError, match="PTBTokenizer gave 0 lines for 1 captions"):
            official_tokens(["a"])

    def test_the_mean_is_the_corpus_meteor(self, monkeypatch: pytest.MonkeyPatch) -> None:
        class Program:
            def __init__(self) -> None:
                from threading import Lock

                self.lock = Lock()

            def compute_score(self, given: dict[int, Any], said: dict[int, Any]) -> tuple[float, list[float]]:
                assert given[0] == ["a  b"]
                return 0.5, [0.2, 0.6]

        monkeypatch.setattr("pycocoevalcap.meteor.meteor.Meteor", Program)
        values = metrics._meteor({0: ["a ||| b"], 1: ["c"]}, {0: ["a"], 1: ["c"]})
        assert values.tolist() == pytest.approx([0.3, 0.7])

    @pytest.mark.slow
    @pytest.mark.skipif(not has_java(), reason="METEOR needs Java")
    def test_meteor_itself(self) -> None:
        said, references = ["a red car", "a boat on the sea"], [["a red car", "one car"], ["a ship at sea"]]
        found = caption_values(said, references, java=True)
        assert found["meteor"][0] > found["meteor"][1] > 0
        assert found["meteor"].mean() < 1.01


def captioning_data(image_of: list[int], texts: tuple[str, ...]) -> Splits:
    data = Examples(
        name="by hand",
        split="test",
        pictures=[PictureFile(Path(f"{i}.png")) for i in range(3)],
        texts=texts,
        image_of=np.array(image_of),
        text_of=np.arange(len(image_of)),
        labels=np.array(image_of),
    )
    return caption_splits(Splits(train=data, test=data))


def test_scores_and_baseline(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(metrics, "has_java", lambda: False)
    splits = captioning_data([0, 2, 2, 0], ("a red car", "a blue boat", "a boat", "a red car"))
    scores = score("captioning", splits.test, Prediction(captions=("a red car", "never seen", "a boat here")))
    assert scores.clusters["cider"].tolist() == [0, 2]  # picture 1 has no caption to compare with
    given = [["a red car", "a red car"], ["a blue boat", "a boat"]]
    expected = values_of_tokens(["a red car", "a boat here"], given)
    for name, values in expected.items():
        assert scores.values[name].tolist() == pytest.approx(values.tolist())
    usual = majority(splits.train, splits.test)
    expected = values_of_tokens(["a red car", "a red car"], given)
    assert usual.values["cider"].tolist() == pytest.approx(expected["cider"].tolist())
    assert usual.values["cider"][0] > usual.values["cider"][1]
