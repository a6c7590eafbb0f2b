"""A function as teacher: what it may return, how it is found, and what is said when it fails."""

import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from distill import DistillError, Request, Signal, load_teacher
from distill.teachers.callable import CallableTeacher

ANSWERS = ("red", "green", "blue")
TEXTS = ["which colour?", "and this one?"]
PICTURES = [Image.new("RGB", (4, 3), colour) for colour in ((200, 40, 20), (0, 10, 250))]

SIMULATOR = """
import numpy as np

def mean_colour(pictures, texts):
    return np.stack([np.asarray(picture).reshape(-1, 3).mean(0) / 51 for picture in pictures])
"""


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", list(sys.path))
    return tmp_path


def ask(teacher: CallableTeacher, pictures=PICTURES, texts=TEXTS) -> Signal:
    return teacher.signal(teacher.prepare(pictures, texts), Request())


def test_a_function_of_a_module_in_the_working_directory(folder):
    (folder / "simulator_one.py").write_text(SIMULATOR)
    teacher = load_teacher("callable", target="simulator_one:mean_colour", answers=ANSWERS)
    assert load_teacher(teacher) is teacher
    assert teacher.fields == {"logits"}
    torch.testing.assert_close(ask(teacher).logits, torch.tensor([[200, 40, 20], [0, 10, 250]]) / 51)


def test_the_fingerprint_follows_source_and_settings(folder):
    (folder / "simulator_two.py").write_text(SIMULATOR)
    settings = {"target": "simulator_two:mean_colour", "answers": ANSWERS}
    before = CallableTeacher(**settings).fingerprint
    assert before == CallableTeacher(**settings).fingerprint
    assert before != CallableTeacher(**settings, gives="probabilities").fingerprint
    assert before != CallableTeacher(**{**settings, "answers": ANSWERS[::-1]}).fingerprint
    (folder / "simulator_two.py").write_text(SIMULATOR.replace("51", "52"))
    assert before != CallableTeacher(**settings).fingerprint


def test_probabilities_become_their_logarithms_and_zero_stays_finite():
    teacher = CallableTeacher(
        target=lambda p, t: [[0.5, 0.5, 0], [0.2, 0.3, 0.5]], answers=ANSWERS, gives="probabilities"
    )
    logits = ask(teacher).logits
    torch.testing.assert_close(logits.softmax(-1), torch.tensor([[0.5, 0.5, 0], [0.2, 0.3, 0.5]]), rtol=0, atol=2e-6)
    assert torch.isfinite(logits).all()


def test_tensors_are_taken_without_their_graph():
    weights = torch.ones(2, 3, requires_grad=True)
    logits = ask(CallableTeacher(target=lambda p, t: weights * 2, answers=ANSWERS)).logits
    assert not logits.requires_grad
    assert logits.tolist() == [[2.0] * 3] * 2


def test_strings_of_a_black_box():
    teacher = CallableTeacher(target=lambda p, t: [text.upper() for text in t], gives="answers")
    assert teacher.fields == {"answers"}
    assert ask(teacher).answers == ("WHICH COLOUR?", "AND THIS ONE?")


def test_two_pictures_per_example_come_as_tuples():
    def brighter(pictures, texts):
        assert [len(pair) for pair in pictures] == [2]
        assert texts == ["which is redder?"]
        return [[np.asarray(picture)[..., 0].mean() for picture in pair] for pair in pictures]

    teacher = CallableTeacher(target=brighter, answers=("left", "right"), pictures=2)
    assert ask(teacher, PICTURES, ["which is redder?"] * 2).logits.tolist() == [[200, 0]]


def test_an_error_names_the_example():
    def fragile(pictures, texts):
        if any(text == "and this one?" for text in texts):
            raise KeyError("no such scene")
        return np.zeros((len(texts), 3))

    with pytest.raises(
        DistillError, match=r"fragile\) failed: KeyError: 'no such scene', at the text 'and this one\?'"
    ):
        ask(CallableTeacher(target=fragile, answers=ANSWERS))


def test_an_error_of_a_batch_alone_names_its_first_text():
    def greedy(pictures, texts):
        if len(texts) > 1:
            raise MemoryError("too many")
        return np.zeros((1, 3))

    with pytest.raises(
        DistillError, match=r"MemoryError: too many, at 2 examples together, the first 'which colour\?'"
    ):
        ask(CallableTeacher(target=greedy, answers=ANSWERS))


@pytest.mark.parametrize(
    ("gives", "value", "message"),
    [
        ("logits", np.zeros((2, 4)), r"logits have the shape \[2, 4\]; 2 pair\(s\) and 3 answers make \[2, 3\]"),
        ("logits", "many", "logits must be numbers"),
        ("logits", [[0, 0, 0], [0, np.nan, 0]], r"the text 'and this one\?' has logits that are not finite; 1 of 2"),
        ("probabilities", [[1, 0, 0], [0.9, 0, 0]], r"'and this one\?' has probabilities that are negative or do not"),
        ("probabilities", [[1, 1, -1], [1, 0, 0]], r"'which colour\?' has probabilities that are negative"),
        ("answers", ["red"], "must return a list of 2 strings"),
        ("answers", [1, 2], "must return a list of 2 strings"),
    ],
)
def test_what_it_may_not_return(gives, value, message):
    with pytest.raises(DistillError, match=message):
        ask(CallableTeacher(target=lambda p, t: value, answers=ANSWERS, gives=gives))


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"target": "simulator", "answers": ANSWERS}, "target is 'simulator'; write module:function"),
        ({"target": "no_such_module_here:f", "answers": ANSWERS}, "cannot import 'no_such_module_here'"),
        ({"target": "json:no_function", "answers": ANSWERS}, "the module 'json' has no 'no_function'"),
        ({"target": "json:__doc__", "answers": ANSWERS}, "'json:__doc__' cannot be called"),
        ({"target": len}, "needs the vocabulary"),
        ({"target": len, "answers": ANSWERS, "gives": "scores"}, "gives is 'scores'; use one of logits"),
    ],
)
def test_settings_that_do_not_fit(settings, message):
    with pytest.raises(DistillError, match=message):
        CallableTeacher(**settings)


def test_a_function_without_a_file_cannot_be_stored():
    teacher = CallableTeacher(target=eval("lambda p, t: [[0, 0, 0]] * len(t)"), answers=ANSWERS)
    assert ask(teacher).logits.shape == (2, 3)
    with pytest.raises(DistillError, match="write the function into a module"):
        teacher.fingerprint  # noqa: B018
