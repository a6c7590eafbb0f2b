"""VQA accuracy against the official tool: stored scores of 600 awkward items, and cases worked out by hand."""

import json
from collections import defaultdict
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from benchmarks.metrics import vqa_accuracies, vqa_accuracy
from benchmarks.speed.reference_vqa import evaluate

OFFICIAL = Path(__file__).parents[3] / "shared" / "data" / "vqa_official_dev.json"

# Prediction, votes (answer: people), official score; the comment says which rule decides.
CASES = [
    ("yes", {"yes": 10}, 1.0),
    ("no", {"yes": 10}, 0.0),
    ("cat", {"cat": 1, "dog": 9}, 0.3),  # nine turns see one match
    ("cat", {"cat": 2, "dog": 8}, 0.6),
    ("cat", {"cat": 3, "dog": 7}, 0.9),
    ("cat", {"cat": 4, "dog": 6}, 1.0),
    ("Yes", {"yes": 10}, 0.0),  # all agree: nothing is normalised
    ("yes", {"Yes.": 10}, 0.0),
    ("Yes.", {"Yes.": 10}, 1.0),
    ("Yes!", {"yes": 9, "no": 1}, 1.0),  # they disagree: both sides are normalised
    ("yes\n", {"yes": 10}, 1.0),  # the ends are stripped even so
    ("YES", {"yes": 5, " yes\t": 5}, 0.0),  # stripped first, so these ten agree
    ("tab\there", {"tab here": 9, "x": 1}, 1.0),
    ("two", {"2": 9, "x": 1}, 1.0),
    ("none", {"0": 9, "x": 1}, 1.0),
    ("eleven", {"11": 9, "x": 1}, 0.0),  # the number words end at ten
    ("The cat", {"a cat": 9, "x": 1}, 1.0),
    ("", {"the": 3, "x": 7}, 0.9),  # an article alone becomes the empty answer
    ("1,000", {"1000": 9, "x": 1}, 1.0),
    ("1,000 t-shirts", {"1000 tshirts": 9, "x": 1}, 1.0),  # one digit comma: every mark goes without a space
    ("t-shirt", {"t shirt": 9, "x": 1}, 1.0),  # else a mark inside a word becomes a space
    ("t-shirt", {"tshirt": 9, "x": 1}, 0.0),
    ("x-ray -film", {"xray film": 9, "x": 1}, 1.0),  # a mark that touches a space anywhere goes everywhere
    ("6.", {"6": 9, "x": 1}, 1.0),  # full stops go even after a digit...
    ("6.5", {"6.5": 9, "65": 1}, 1.0),  # ...but not before one
    ("U.S.", {"us": 9, "x": 1}, 1.0),
    ("no" + 32 * ".", {"no": 9, "x": 1}, 1.0),
    ("no" + 33 * ".", {"no": 9, "x": 1}, 0.0),  # re.UNICODE stands where the count belongs: 32 at most
    ("dont", {"don't": 9, "x": 1}, 1.0),
    ("yall'll", {"y'all'll": 9, "x": 1}, 1.0),
    ("somebody'd", {"somebodyd": 9, "x": 1}, 1.0),  # this one loses its apostrophe
    ("Im in", {"I'm in": 9, "x": 1}, 0.0),  # keys with a capital never match
    ("lets go", {"let's go": 9, "x": 1}, 0.0),  # the table's key is "let's" itself
    ("yes:", {"yes": 9, "x": 1}, 0.0),  # a colon is no punctuation
    ("#1", {"1": 9, "x": 1}, 0.0),
    ("5'6\"", {"5'6": 9, "x": 1}, 1.0),  # a double quote is, an apostrophe is not
    ("cat", {"cat": 1}, 0.0),  # leaving the only answer out leaves no match
    ("cat", {"cat": 2}, 1 / 3),
    ("cat", {"cat": 3}, 2 / 3),
    ("cat", {"cat": 4}, 1.0),
    ("cat", {"cat": 3, "dog": 2}, (3 * 2 / 3 + 2) / 5),
    ("cat", {"cat": 5, "dog": 15}, 1.0),
]


@pytest.mark.parametrize(("prediction", "votes", "score"), CASES)
def test_cases_by_hand(prediction, votes, score):
    answers = [answer for answer, people in votes.items() for _ in range(people)]
    assert vqa_accuracy(prediction, answers) == pytest.approx(score, abs=1e-12)


@pytest.fixture(scope="module")
def official():
    if not OFFICIAL.exists():
        pytest.skip("the official scores are kept outside the repository")
    return json.loads(OFFICIAL.read_text(encoding="utf-8"))


@pytest.fixture(scope="module")
def scores(official):
    return [
        vqa_accuracy(item["prediction"], [answer["answer"] for answer in item["answers"]]) for item in official["items"]
    ]


def test_every_item_to_the_last_digit(official, scores):
    assert len(scores) == 600
    assert [round(100 * score, 6) for score in scores] == [item["official_score"] for item in official["items"]]


def test_overall(official, scores):
    assert round(100 * sum(scores) / len(scores), 6) == official["overall"]


@pytest.mark.parametrize("kind", ["question_type", "answer_type"])
def test_per_type(official, scores, kind):
    grouped = defaultdict(list)
    for item, score in zip(official["items"], scores, strict=True):
        grouped[item[kind]].append(score)
    means = {name: round(100 * sum(group) / len(group), 6) for name, group in grouped.items()}
    assert means == official[f"per_{kind}"]


def test_many_questions_at_once_are_the_same_to_the_last_bit(official, scores):
    predictions = [item["prediction"] for item in official["items"]]
    people = [[answer["answer"] for answer in item["answers"]] for item in official["items"]]
    assert vqa_accuracies(predictions, people).tolist() == scores


# Short strings over what the rules look at, so that answers collide before and after normalisation.
PIECES = [
    "a",
    "the",
    "two",
    "2",
    "dont",
    "Don't",
    " ",
    "\n",
    "\t",
    ",",
    ".",
    "-",
    "'",
    "1,0",
    "É",
    "\u00a0",
    "\ud800",
    "Ⅷ",
]
STRINGS = st.lists(st.sampled_from(PIECES), max_size=3).map("".join) | st.text(max_size=4)


@st.composite
def questions(draw):
    """Give few strings to many answers, so that every number of matches comes up, in every order."""
    strings = st.sampled_from(draw(st.lists(STRINGS, min_size=1, max_size=4)))
    people = st.lists(strings, min_size=1, max_size=12)
    return draw(st.lists(st.tuples(strings, people), min_size=1, max_size=8))


@settings(max_examples=400, deadline=None)
@given(questions())
def test_many_at_once_equal_one_by_one_and_the_ported_loop(items):
    predictions, people = [item[0] for item in items], [item[1] for item in items]
    one_by_one = [vqa_accuracy(prediction, answers) for prediction, answers in items]
    assert vqa_accuracies(predictions, people).tolist() == one_by_one
    gts = {
        number: {"answers": [{"answer": answer, "answer_id": person} for person, answer in enumerate(answers)]}
        for number, answers in enumerate(people)
    }
    assert evaluate(gts, {number: {"answer": answer} for number, answer in enumerate(predictions)}) == one_by_one


def test_more_answers_than_bits():
    people = [["cat"] * hits + ["dog"] * (200 - hits) for hits in range(8)]
    assert vqa_accuracies(["cat"] * 8, people).tolist() == [vqa_accuracy("cat", answers) for answers in people]


def test_many_at_once_refuse_what_cannot_be_scored():
    assert vqa_accuracies([], []).shape == (0,)
    with pytest.raises(ValueError, match="1 predictions do not fit 2 questions"):
        vqa_accuracies(["x"], [["x"], ["x"]])
    with pytest.raises(ValueError, match="cannot score 'y': question 1 has no ground-truth answers"):
        vqa_accuracies(["x", "y"], [["x"], []])
