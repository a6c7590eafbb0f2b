"""A student's moving average: its formula, its place in checkpoints, and what it teaches."""

import numpy as np
import pytest
import torch
from safetensors import safe_open

import cvlm
from cvlm.errors import CvlmError
from cvlm.model import compose
from cvlm.training import EmaTeacher
from distill import DistillError, Request, load_teacher
from distill.teachers.base import as_keyed

FIELDS = Request(fields=frozenset({"logits"}))


@pytest.fixture
def student(tiny_spec):
    def make(seed=0, **spec):
        torch.manual_seed(seed)
        spec = {"dropout": 0.0, **spec}
        return compose(tiny_spec("cross", **spec), task="vqa", answers=("red", "green", "blue"))

    return make


class KilledError(Exception):
    pass


def kill_at(step):
    def report(done, steps, loss):
        if done == step:
            raise KilledError

    return report


def distil(model, teacher, examples, folder, report=None, **phase):
    settings = {"epochs": 4, "batch_size": 6, "objectives": ["labels", "logits", "cross_attention"], **phase}
    return cvlm.distill(
        model, teacher, data=examples, out=folder, features=folder.parent / "features", report=report, **settings
    )


def test_the_average_follows_every_step(student, colour_vqa, tmp_path):
    model, teacher, seen = student(), load_teacher("ema", decay=0.7), []
    trained = [name for name, value in model.named_parameters() if value.requires_grad]
    assert trained
    assert not any(name.startswith(("vision.", "text.")) for name in trained)
    wanted = {name: model.state_dict()[name].double().numpy().copy() for name in trained}

    def report(step, steps, loss):
        seen.append(step)
        for name in trained:
            wanted[name] = 0.7 * wanted[name] + 0.3 * model.state_dict()[name].double().numpy()

    distil(model, teacher, colour_vqa(24), tmp_path / "run", report)
    assert seen == list(range(1, 17))
    average = teacher.teacher.model.state_dict()
    for name in trained:
        np.testing.assert_allclose(average[name].numpy(), wanted[name], rtol=1e-4, atol=1e-6, err_msg=name)
        if model.state_dict()[name].dim() > 1:
            assert not torch.equal(average[name], model.state_dict()[name]), name


def test_it_begins_as_the_student_and_then_differs(student, colour_vqa, tmp_path):
    log = distil(student(), EmaTeacher(decay=0.99), colour_vqa(24), tmp_path / "run").log
    assert log[0]["term/logits"] == pytest.approx(0, abs=1e-6)
    assert log[0]["term/cross_attention"] == pytest.approx(0, abs=1e-6)
    assert log[-1]["term/logits"] > 1e-4
    assert log[-1]["term/labels"] < log[0]["term/labels"]


def test_an_interrupted_phase_goes_on_with_the_same_average(student, colour_vqa, tmp_path):
    examples, whole, cut, last = colour_vqa(24), student(dropout=0.1), student(dropout=0.1), EmaTeacher(decay=0.8)
    distil(whole, EmaTeacher(decay=0.8), examples, tmp_path / "whole")
    with pytest.raises(KilledError):
        distil(cut, EmaTeacher(decay=0.8), examples, tmp_path / "cut", kill_at(9))
    (checkpoint, *_) = (tmp_path / "cut").glob("checkpoint-*")
    with safe_open(checkpoint / "average.safetensors", "pt") as file:
        kept = set(file.keys())
    assert kept == {name for name, value in cut.named_parameters() if value.requires_grad}
    again = student(dropout=0.1)
    for value in again.fusion.parameters():
        torch.nn.init.normal_(value)
    distil(again, last, examples, tmp_path / "cut")
    for name, value in whole.state_dict().items():
        if not name.startswith(("vision.", "text.")):
            assert torch.equal(value, again.state_dict()[name]), name


def test_another_decay_does_not_go_on_from_its_checkpoints(student, colour_vqa, tmp_path):
    with pytest.raises(KilledError):
        distil(student(), EmaTeacher(decay=0.8), colour_vqa(24), tmp_path / "cut", kill_at(9))
    with pytest.raises(CvlmError, match="holds the checkpoints of another phase"):
        distil(student(), EmaTeacher(decay=0.9), colour_vqa(24), tmp_path / "cut")


def test_what_does_not_train_is_shared_and_buffers_are_copied(student):
    model, teacher = student(vision={"train": "last_1"}), EmaTeacher(decay=0.5)
    model.register_buffer("counter", torch.tensor(3))
    teacher.follow(model)
    average = teacher.teacher.model
    frozen = [name for name, value in model.named_parameters() if not value.requires_grad]
    assert any(name.startswith("vision.") for name in frozen)
    for name, value in average.named_parameters():
        assert (value is dict(model.named_parameters())[name]) == (name in frozen), name
    before = average.fusion.state_dict()
    before = {name: value.clone() for name, value in before.items()}
    with torch.no_grad():
        for value in model.parameters():
            if value.requires_grad:
                value += 1
        model.counter += 4
    teacher.update()
    assert int(average.counter) == 7
    for name, value in average.fusion.state_dict().items():
        torch.testing.assert_close(value, before[name] + 0.5)
    assert not any(value.requires_grad for value in average.fusion.parameters())
    assert not average.training
    assert all(value.requires_grad for value in model.fusion.parameters()), "the student still trains"


def test_it_is_told_from_other_teachers_without_being_asked():
    teacher = EmaTeacher()
    assert load_teacher(teacher) is teacher
    assert as_keyed(teacher) is None


def test_what_it_refuses():
    with pytest.raises(DistillError, match=r"decay is 1\.0, it must lie between 0 and 1"):
        EmaTeacher(decay=1.0)
    with pytest.raises(DistillError, match="follows no student yet"):
        EmaTeacher().signal({}, FIELDS)
    with pytest.raises(DistillError, match="its targets cannot be stored"):
        EmaTeacher().fingerprint  # noqa: B018
