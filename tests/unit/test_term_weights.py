"""Weights over a phase: what is computed, measured, balanced, logged and paid for in which step."""

import numpy as np
import pytest
import torch
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

import cvlm
from cvlm.config import EngineSpec, PhaseSpec, parse_recipe
from cvlm.data import Examples
from cvlm.errors import CvlmError
from cvlm.training import CvlmTeacher, LiveTarget, PhaseJob, model_inputs, train_phase
from cvlm.training.module import PhaseModule
from cvlm.training.weights import SMOOTHING, StepPlan, TermWeights
from distill import Request, build_objective

ANSWERS = ("no", "perhaps", "yes")
WORDS = ("which", "colour", "is", "it", "what", "the", "of", "this", "whole", "picture")
SWITCH = {"schedule": "switch", "from": 0.0, "to": 1.0, "at": 0.5}
DOKTRA = (
    {"kind": "activation_boundary", "weight": {**SWITCH, "from": 1.0, "to": 0.0}},
    {"kind": "labels", "weight": SWITCH},
    {"kind": "entropy", "weight": {**SWITCH, "to": 0.5}},
)


@pytest.fixture(scope="module")
def texts() -> Examples:
    draw = np.random.default_rng(0)
    labels = np.arange(24, dtype=np.int64) % 3
    return Examples(
        name="texts",
        split="train",
        pictures=[],
        texts=tuple(" ".join(draw.permutation(WORDS)[:4]) + "?" * int(label) for label in labels),
        image_of=np.empty((24, 0), dtype=np.int64),
        text_of=np.arange(24, dtype=np.int64),
        labels=labels,
        answers=ANSWERS,
    )


@pytest.fixture(scope="module")
def job(bert_folder, texts):
    """Makes a phase of the tiny BERT; 2 epochs of 24 texts in batches of 4 are 12 steps."""

    def make(folder, objectives, *, teacher=None, train="last_1", report=None, engine=None, **phase):
        torch.manual_seed(0)
        student = cvlm.build(
            vision=None, text={"name": f"hf:{bert_folder}", "train": train}, task="text", answers=ANSWERS
        )
        settings = {"epochs": 2, "batch_size": 4, "learning_rate": 1e-3, **phase}
        return PhaseJob(
            student=student,
            phase=PhaseSpec(objectives=objectives, **settings),
            objectives=[build_objective(**(o if isinstance(o, dict) else {"kind": o})) for o in objectives],
            inputs=model_inputs(student, texts, folder / "features"),
            target=None if teacher is None else LiveTarget(teacher=teacher, examples=texts),
            engine=engine or EngineSpec(),
            folder=folder / "phase",
            report=report,
        )

    return make


@pytest.fixture
def teacher(bert_folder):
    torch.manual_seed(9)
    text = {"name": f"hf:{bert_folder}", "pretrained": False}
    return CvlmTeacher(cvlm.build(vision=None, text=text, task="text", answers=ANSWERS))


def weights_of(job) -> dict[str, torch.Tensor]:
    return {name: value.clone() for name, value in job.student.state_dict().items()}


def assert_equal(left, right, tolerance=0.0):
    assert left.keys() == right.keys()
    for name in left:
        torch.testing.assert_close(left[name], right[name], rtol=tolerance, atol=tolerance)


def test_a_term_of_weight_0_is_not_computed_and_the_teacher_not_asked(job, teacher, tmp_path, monkeypatch):
    asked, computed = [], {"activation_boundary": [], "labels": [], "entropy": []}
    phase = job(tmp_path, DOKTRA, teacher=teacher)
    for term in phase.objectives:
        forward = term.forward
        monkeypatch.setattr(
            term, "forward", lambda *a, _f=forward, _k=term.kind, **k: computed[_k].append(len(steps)) or _f(*a, **k)
        )
    signal, steps = teacher.signal, []
    monkeypatch.setattr(teacher, "signal", lambda *a: asked.append(len(steps)) or signal(*a))
    phase = PhaseJob(**{**vars(phase), "report": lambda *_: steps.append(1)})
    before = len(asked)
    _, log = train_phase(phase)
    # The first entries are of the batch that makes adapters and counts FLOPs, before step 1.
    assert {step for step in asked[before:] if step} == {1, 2, 3, 4, 5}
    assert {step for step in computed["activation_boundary"] if step} == {1, 2, 3, 4, 5}
    assert {step for step in computed["labels"] if step} == {6, 7, 8, 9, 10, 11}
    assert computed["entropy"][-6:] == computed["labels"][-6:]
    assert [record["step"] for record in log if "term/labels" in record] == [7, 8, 9, 10, 11, 12]
    assert [record["weight/entropy"] for record in log] == [0] * 6 + [0.5] * 6
    assert all(("term/activation_boundary" in record) == (record["step"] <= 6) for record in log)
    assert log[-1]["loss"] == pytest.approx(log[-1]["term/labels"] + 0.5 * log[-1]["term/entropy"], rel=1e-4)


def test_each_stage_is_paid_for_as_it_is(job, teacher, tmp_path):
    def flops(name, at):
        switch = {**SWITCH, "at": at}
        terms = ({"kind": "activation_boundary", "weight": {**switch, "from": 1.0, "to": 0.0}},)
        terms += ({"kind": "labels", "weight": switch},)
        return train_phase(job(tmp_path / name, terms, teacher=teacher, accumulate=1))[0].flops

    taught, both, labelled = flops("taught", 1.0), flops("both", 0.5), flops("labelled", 0.0)
    assert taught > labelled
    assert both == pytest.approx((taught + labelled) / 2, rel=1e-9)


def test_a_schedule_is_the_same_whatever_the_micro_batches(job, teacher, tmp_path):
    linear = {"schedule": "linear", "from": 1.0, "to": 0.2}
    terms = (DOKTRA[0], {"kind": "labels", "weight": SWITCH}, {"kind": "logits", "weight": linear})
    states = []
    for size, accumulate in ((8, 1), (2, 4)):
        phase = job(tmp_path / str(size), terms, teacher=teacher, batch_size=size, accumulate=accumulate)
        phase.student.text.model.config.hidden_dropout_prob = 0
        for module in phase.student.modules():
            if isinstance(module, torch.nn.Dropout):
                module.p = 0.0
        _, log = train_phase(phase)
        states.append((weights_of(phase), log))
    assert_equal(states[0][0], states[1][0], tolerance=1e-4)
    for one, other in zip(states[0][1], states[1][1], strict=True):
        assert one.keys() == other.keys()
        for name in one:
            if name.startswith(("term/", "weight/")):
                assert one[name] == pytest.approx(other[name], rel=1e-3, abs=1e-5), name


def test_an_interrupted_phase_meets_the_same_weights_again(job, teacher, tmp_path):
    class KilledError(Exception):
        pass

    def kill(step, steps, loss):
        if step == 15:
            raise KilledError

    terms = ("labels", {"kind": "entropy", "weight": {**SWITCH, "to": 0.4}}, {"kind": "logits", "weight": 0.7})
    settings = {"teacher": teacher, "balance": "gradient_norm", "log_gradients": True, "epochs": 4}
    whole = job(tmp_path / "whole", terms, **settings)
    _, expected = train_phase(whole)
    with pytest.raises(KilledError):
        train_phase(job(tmp_path / "cut", terms, report=kill, **settings))
    steps = []
    resumed = job(tmp_path / "cut", terms, report=lambda step, *_: steps.append(step), **settings)
    _, log = train_phase(resumed)
    assert steps[0] > 10, "it began again, or before weights were balanced"
    assert_equal(weights_of(whole), weights_of(resumed))
    kept = ("step", "loss", "weight/logits", "weight/entropy", "gradient/logits")
    assert [[record[name] for name in kept] for record in log[-8:]] == [
        [record[name] for name in kept] for record in expected[-8:]
    ]
    assert expected[-1]["weight/logits"] != 0.7


def test_gradient_shares_are_norms_at_the_shared_parameters(job, teacher, tmp_path):
    phase = job(tmp_path, ("labels", {"kind": "logits", "weight": 3.0}, "entropy"), teacher=teacher, log_gradients=True)
    student = phase.student.eval()
    inputs = phase.inputs.pairs(np.arange(8))
    labels = torch.from_numpy(phase.inputs.examples.labels[:8])
    module = PhaseModule(student, phase.objectives, Request(fields=frozenset({"logits"})))
    module.begin(0.0, measure=True)
    target = teacher.signal(teacher.prepare([], list(phase.inputs.examples.texts[:8])), Request())
    found = module(None, inputs["text"], labels, target, [8.0, 8.0, 8.0])
    for term in phase.objectives:
        student.zero_grad()
        value, _ = term(student(None, inputs["text"]), target, labels)
        (value / 8).backward()
        expected = torch.cat([parameter.grad.flatten() for parameter in student.shared_parameters]).norm()
        torch.testing.assert_close(found[f"gradient/{term.kind}"], expected)
    _, log = train_phase(phase)
    for record in log:
        shares = [record[f"gradient/{name}"] for name in ("labels", "logits", "entropy")]
        assert sum(shares) == pytest.approx(1)
        assert min(shares) > 0
    events = EventAccumulator(str(tmp_path / "phase" / "tensorboard")).Reload()
    assert {"train/gradient/logits", "train/weight/logits", "train/term/logits"} <= set(events.Tags()["scalars"])


def test_what_the_task_and_a_fusion_module_share(tiny_spec):
    from cvlm.model import compose

    model = compose(tiny_spec("co_attention"), task="vqa", answers=ANSWERS)
    own = {id(parameter): name for name, parameter in model.named_parameters()}
    names = {own[id(parameter)] for parameter in model.shared_parameters}
    assert names == {name for name in own.values() if name.startswith("fusion.blocks.1.")}
    dual = compose(tiny_spec("none"), task="retrieval")
    assert {id(p) for p in dual.shared_parameters} == {id(p) for p in dual.fusion.parameters()}


def test_balancing_makes_gradients_as_strong_as_asked_for():
    terms = [build_objective("labels", weight=2.0), build_objective("entropy", weight=0.5), build_objective("logits")]
    weights = TermWeights(terms, ["labels", "entropy", "logits"], balance=True)
    assert weights.values() == [2.0, 0.5, 1.0]
    norms = {"labels": 3.0, "entropy": 12.0}
    weights.rebalance(norms)
    assert weights.values() == pytest.approx([2.0, 0.5 * 3 / 12, 1.0])  # logits was not measured
    assert weights.values()[1] * norms["entropy"] == pytest.approx(0.5 * norms["labels"])
    weights.rebalance({"labels": 3.0, "entropy": 3.0, "logits": 6.0})
    assert weights.values() == pytest.approx([2.0, 0.5 * (SMOOTHING * 0.25 + (1 - SMOOTHING)), 0.5])
    before = weights.values()
    weights.rebalance({"entropy": 1.0, "logits": 1.0})
    weights.rebalance({"labels": float("nan"), "entropy": 1.0})
    weights.rebalance({"labels": 1.0, "entropy": 0.0})
    assert weights.values() == before


def test_a_balanced_phase_logs_nearly_equal_shares(job, teacher, tmp_path):
    terms = ("labels", {"kind": "logit_mse", "weight": 1.0})
    settings = {"teacher": teacher, "log_gradients": True, "epochs": 10, "learning_rate": 1e-5, "batch_size": 24}
    _, plain = train_phase(job(tmp_path / "plain", terms, **settings))
    _, balanced = train_phase(job(tmp_path / "balanced", terms, balance="gradient_norm", **settings))
    far = np.mean([abs(record["gradient/logit_mse"] - 0.5) for record in plain[1:]])
    near = np.mean([abs(record["gradient/logit_mse"] - 0.5) for record in balanced[1:]])
    assert near < far / 2


def test_plans_measure_where_something_reads_it():
    plan = StepPlan(steps=25, log_every=4, log_gradients=True)
    assert [step for step in range(25) if plan.measures(step)] == [3, 7, 11, 15, 19, 23]
    plan = StepPlan(steps=25, log_every=4, balance=True)
    assert [step for step in range(25) if plan.measures(step)] == [0, 10, 20]
    assert plan.progress(0) == 0
    assert plan.progress(24) < 1


def test_what_cannot_work_is_refused(job, tmp_path):
    silent = ({"kind": "labels", "weight": {"schedule": "linear", "from": 0, "to": 1}},)
    with pytest.raises(CvlmError, match="every objective has weight 0 in step 1 of 12"):
        train_phase(job(tmp_path / "a", silent))
    engine = EngineSpec(deepspeed=tmp_path / "zero2.json")
    with pytest.raises(CvlmError, match="log_gradients and balance read gradients, which DeepSpeed keeps"):
        train_phase(job(tmp_path / "b", ("labels",), engine=engine, log_gradients=True))
    phase = {"objectives": [{"kind": "labels", "weight": {"schedule": "switch", "from": 0, "to": 1}}]}
    raw = {
        "task": "text",
        "data": {"kind": "tweets"},
        "student": {"vision": None, "text": {"name": "package:minilm_l6"}},
        "phases": {"finetune": phase},
    }
    with pytest.raises(CvlmError, match=r"phases\.finetune\.objectives\.0\.weight: weight .* lacks at"):
        parse_recipe(raw)


def test_a_frozen_encoder_is_stored_once_and_its_head_trains(job, tmp_path):
    phase = job(tmp_path, ("labels", "entropy"), train="frozen", log_gradients=True, epochs=8)
    assert phase.inputs.stored == {"text"}
    before = weights_of(phase)
    _, log = train_phase(phase)
    after = weights_of(phase)
    changed = {name.split(".")[0] for name in after if not torch.equal(before[name], after[name])}
    assert changed == {"answer_head"}
    assert log[-1]["gradient/labels"] > 0
