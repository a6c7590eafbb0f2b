"""The trainer's promises: one trajectory whatever the batching, the interruption, or the teacher's storage."""

import copy
from dataclasses import replace

import numpy as np
import pytest
import torch

import cvlm
import cvlm.training.phase as phase_module
from cvlm.config import EasyVqaData, PhaseSpec
from cvlm.data import Examples, load_data
from cvlm.errors import CvlmError
from cvlm.training import CvlmTeacher, LiveTarget, PhaseJob, model_inputs, requests, store_targets, train_phase
from cvlm.training.inputs import ModelInputs
from cvlm.training.trainer import COMPLETE, last_complete_checkpoint
from distill import build_objective

FUSION = {"kind": "co_attention", "width": 24, "depth": 2, "heads": 3, "dropout": 0.0}


@pytest.fixture(scope="module")
def examples() -> Examples:
    return load_data(EasyVqaData(kind="easy_vqa", limit=48), "vqa").train


def make_model(examples, size=32, seed=0, **fusion):
    torch.manual_seed(seed)
    return cvlm.build(
        vision={"name": "package:efficientnet_lite0", "image_size": size, "layer": 3},
        text="package:minilm_l6",
        fusion={**FUSION, **fusion},
        task="vqa",
        answers=examples.answers,
    )


def make_job(model, examples, folder, *, objectives=("labels",), target=None, report=None, **phase):
    terms = [build_objective(**o) if isinstance(o, dict) else build_objective(o) for o in objectives]
    settings = {"epochs": 2, "batch_size": 8, "pairs": "all", "learning_rate": 1e-3, **phase}
    return PhaseJob(
        student=model,
        phase=PhaseSpec(objectives=("labels",), **settings),
        objectives=terms,
        inputs=model_inputs(model, examples, folder / "features"),
        target=target,
        folder=folder / "phase",
        report=report,
    )


def trained_state(job):
    train_phase(job)
    return copy_of_trained(job)


def copy_of_trained(job):
    return {k: v.clone() for k, v in job.student.state_dict().items() if not k.startswith(("vision.", "text."))}


def assert_same(left, right, tolerance=0.0):
    assert left.keys() == right.keys()
    for name in left:
        torch.testing.assert_close(left[name], right[name], rtol=tolerance, atol=tolerance, msg=lambda m, n=name: n + m)


def test_one_batch_of_8_equals_4_accumulated_batches_of_2(examples, tmp_path):
    # Half of the labels are hidden, so micro-batches differ in how many labels they hold.
    ragged = examples.hide_labels(0.5, seed=0)
    objectives = ("labels", {"kind": "logits", "weight": 0.5})
    teacher = LiveTarget(teacher=CvlmTeacher(make_model(examples, seed=7)), examples=ragged)
    states = []
    for number, (size, accumulate) in enumerate(((8, 1), (2, 4))):
        job = make_job(
            make_model(examples),
            ragged,
            tmp_path / str(number),
            objectives=objectives,
            target=teacher,
            batch_size=size,
            accumulate=accumulate,
            epochs=0.5,
        )
        states.append(trained_state(job))
    # Sums run in another order, and Adam divides by small numbers: 1e-4 of steps that are 1e-3 each.
    assert_same(*states, tolerance=1e-4)


def test_an_interrupted_phase_ends_in_the_same_weights_and_log(examples, tmp_path, monkeypatch):
    monkeypatch.setattr(phase_module, "LOGS_PER_PHASE", 5)  # means over three steps: no checkpoint may fall between

    class KilledError(Exception):
        pass

    def kill(step, steps, loss):
        if step == 8:
            raise KilledError

    job = make_job(make_model(examples, dropout=0.1), examples, tmp_path / "whole")
    _, log = train_phase(job)
    whole = copy_of_trained(job)
    with pytest.raises(KilledError):
        train_phase(make_job(make_model(examples, dropout=0.1), examples, tmp_path / "cut", report=kill))
    assert last_complete_checkpoint(tmp_path / "cut" / "phase") is not None
    seen = []
    job = make_job(
        make_model(examples, seed=5, dropout=0.1),
        examples,
        tmp_path / "cut",
        report=lambda step, steps, loss: seen.append(step),
    )
    _, resumed_log = train_phase(job)
    assert seen[0] > 1, "it began again instead of resuming"
    assert_same(whole, copy_of_trained(job))
    assert resumed_log == log


def test_a_checkpoint_without_its_mark_is_not_resumed_from(tmp_path):
    for step, complete in ((2, True), (4, True), (6, False)):
        folder = tmp_path / f"checkpoint-{step}"
        folder.mkdir()
        if complete:
            (folder / COMPLETE).write_text("{}")
    assert last_complete_checkpoint(tmp_path) == tmp_path / "checkpoint-4"


def test_stored_targets_give_the_trajectory_of_the_live_teacher(examples, tmp_path):
    objectives = ("labels", "logits", {"kind": "cross_attention", "layers": "last"})
    teacher = CvlmTeacher(make_model(examples, size=64, seed=7))
    live = LiveTarget(teacher=teacher, examples=examples, inputs=model_inputs(teacher.model, examples, tmp_path / "t"))
    job = make_job(make_model(examples), examples, tmp_path / "live", objectives=objectives, target=live)
    built = store_targets(live, requests(job)[1], tmp_path / "targets", text_length=20, batch_size=16)
    assert built.samples == len(examples)
    assert built.flops > 0
    stored = make_job(make_model(examples), examples, tmp_path / "stored", objectives=objectives, target=built.source)
    # Attention is stored in half precision, relative error 2^-11; Adam steps of 1e-3 carry little of it on.
    assert_same(trained_state(job), trained_state(stored), tolerance=2e-3)
    again = store_targets(live, requests(job)[1], tmp_path / "targets", text_length=20)
    assert again.samples == 0


def test_the_teacher_never_changes_and_never_enters_a_checkpoint(examples, tmp_path):
    teacher = CvlmTeacher(make_model(examples, seed=7))
    before = copy.deepcopy(teacher.model.state_dict())
    saved = []

    def look(step, steps, loss):
        for path in (tmp_path / "phase").glob("checkpoint-*/model.safetensors"):
            from safetensors import safe_open

            with safe_open(path, "pt") as file:
                saved.extend(file.keys())

    target = LiveTarget(teacher=teacher, examples=examples)
    train_phase(make_job(make_model(examples), examples, tmp_path, objectives=("logits",), target=target, report=look))
    assert saved
    assert {name.split(".")[0] for name in saved} == {"student"}
    assert not any(name.startswith(("student.vision", "student.text")) for name in saved), "stored towers are aside"
    assert not teacher.model.training
    for name, tensor in teacher.model.state_dict().items():
        assert torch.equal(tensor, before[name]), name


def test_adapters_train_but_are_no_part_of_the_student(examples, tmp_path):
    model, hidden = make_model(examples), build_objective("hidden")
    target = LiveTarget(teacher=CvlmTeacher(make_model(examples, seed=7, width=40, heads=5)), examples=examples)
    job = replace(make_job(model, examples, tmp_path, target=target), objectives=[hidden])
    names = set(model.state_dict())
    train_phase(job)
    weights = hidden.state_dict()
    assert weights["adapters.0.weight"].shape == (40, 24)
    torch.manual_seed(job.seed)
    assert not torch.equal(weights["adapters.0.weight"], torch.nn.Linear(24, 40).weight)
    assert set(model.state_dict()) == names


def test_towers_are_back_after_training_and_after_an_error(examples, tmp_path):
    model = make_model(examples)
    tower = model.vision

    def fail(step, steps, loss):
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        train_phase(make_job(model, examples, tmp_path, report=fail))
    assert model.vision is tower


def test_cost_counts_every_sample_and_matches_the_log(examples, tmp_path):
    model = make_model(examples)
    cost, log = train_phase(make_job(model, examples, tmp_path, epochs=3))
    assert cost.samples == 3 * len(examples)
    forward = 2 * sum(p.numel() for n, p in model.fusion.named_parameters() if "weight" in n and p.dim() == 2)
    # Each text token passes half of the fusion weights and so does each image token: between 10 and 30 tokens a pair.
    assert 3 * forward * 5 < cost.flops / cost.samples < 3 * forward * 30
    assert log[-1]["term/labels"] == pytest.approx(log[-1]["loss"], rel=1e-5)


def test_labelled_pairs_only(examples, tmp_path):
    few = examples.hide_labels(0.25, seed=3)
    seen = []
    inputs = model_inputs(make_model(examples), few, tmp_path / "features")
    original = ModelInputs.pairs

    def spy(self, index):
        seen.extend(index.tolist())
        return original(self, index)

    job = make_job(make_model(examples), few, tmp_path, pairs="labelled", batch_size=4)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(ModelInputs, "pairs", spy)
        train_phase(replace(job, inputs=inputs))
    assert set(seen) == set(few.labelled.tolist())
    assert len(few.labelled) == 12


def test_nothing_to_train_on_is_refused(examples, tmp_path):
    none = replace(examples, labels=np.full(len(examples), -100))
    with pytest.raises(CvlmError, match=r"0 pair\(s\) to train on"):
        train_phase(make_job(make_model(examples), none, tmp_path, pairs="labelled"))


def test_checkpoints_of_another_phase_are_refused(examples, tmp_path):
    class KilledError(Exception):
        pass

    def kill(step, steps, loss):
        if step == 8:
            raise KilledError

    with pytest.raises(KilledError):
        train_phase(make_job(make_model(examples), examples, tmp_path, report=kill))
    with pytest.raises(CvlmError, match="holds the checkpoints of another phase"):
        train_phase(make_job(make_model(examples), examples, tmp_path, learning_rate=5e-4))
