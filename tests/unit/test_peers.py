"""Mutual learning: the loss of each peer, who gets which gradient, and resuming."""

import copy
from pathlib import Path

import numpy as np
import pytest
import torch
from scipy.special import log_softmax

import cvlm
from cvlm.errors import CvlmError
from cvlm.model import compose
from cvlm.training.peers import PeerBatch, PeerModule, PeerTeacher
from distill import DistillError, Request, build_objective, load_teacher

ANSWERS = ("red", "green", "blue")
REQUEST = Request(fields=frozenset({"logits"}))


@pytest.fixture
def student(tiny_spec):
    def make(seed=0, kind="cross", answers=ANSWERS, **spec):
        torch.manual_seed(seed)
        return compose(tiny_spec(kind, **{"dropout": 0.0, **spec}), task="vqa", answers=answers)

    return make


def inputs(model, examples, index):
    pictures = [examples.pictures[i].load() for i in examples.image_of[index]]
    texts = [examples.texts[i] for i in examples.text_of[index]]
    return {"image": model.vision.prepare(pictures), "text": model.text.prepare(texts)}


def divergence(peer, own):
    """KL(peer || own), summed over rows, from scratch."""
    log_p, log_q = (log_softmax(value.detach().double().numpy(), axis=-1) for value in (peer, own))
    return float((np.exp(log_p) * (log_p - log_q)).sum())


def test_the_loss_of_three_peers(student, colour_vqa):
    examples, index = colour_vqa(12), np.arange(12)
    labels = torch.tensor(examples.labels)
    labels[8:] = -100
    models = [student(0), student(1, "merged"), student(2)]
    shown = [inputs(model, examples, index) for model in models]
    with torch.no_grad():
        logits = [
            model(given["image"], given["text"], request=REQUEST).logits
            for model, given in zip(models, shown, strict=True)
        ]
    terms = [build_objective("labels"), build_objective("mutual", weight=0.7)]
    module = PeerModule(models[0], terms, REQUEST, models[1:])
    assert module.counts(labels, 12) == [8, 12]
    batch = PeerBatch(inputs={"0": shown[1], "1": shown[2]})
    given = module(shown[0]["image"], shown[0]["text"], labels, batch, [8, 12])
    wanted = []
    for k in range(3):
        cross = -log_softmax(logits[k].double().numpy(), axis=-1)[np.arange(8), labels[:8]].mean()
        mutual = np.mean([divergence(logits[j], logits[k]) / 12 for j in range(3) if j != k])
        wanted.append((cross, mutual, cross + 0.7 * mutual))
    given = {name: value.detach() for name, value in given.items()}
    assert float(given["labels"]) == pytest.approx(wanted[0][0], rel=1e-5)
    assert float(given["mutual"]) == pytest.approx(wanted[0][1], rel=1e-4)
    assert float(given["peers"]) == pytest.approx((wanted[1][2] + wanted[2][2]) / 2, rel=1e-5)
    assert float(given["loss"]) == pytest.approx(sum(total for *_, total in wanted), rel=1e-5)


def test_each_peer_gets_the_gradient_of_its_own_loss(student, colour_vqa):
    examples, index = colour_vqa(12), np.arange(12)
    models = [student(0), student(1)]
    shown = [inputs(model, examples, index) for model in models]
    alone = [copy.deepcopy(model) for model in models]
    module = PeerModule(models[0], [build_objective("mutual")], REQUEST, models[1:])
    batch = PeerBatch(inputs={"0": shown[1]})
    module(shown[0]["image"], shown[0]["text"], None, batch, [12])["loss"].backward()
    logits = [
        model(given["image"], given["text"], request=REQUEST).logits for model, given in zip(alone, shown, strict=True)
    ]
    for k, model in enumerate(alone):
        target = logits[1 - k].detach().softmax(-1)
        value = (target * (target.log() - logits[k].log_softmax(-1))).sum() / 12
        model.zero_grad()
        value.backward(retain_graph=True)
        for (name, ours), theirs in zip(models[k].named_parameters(), model.parameters(), strict=True):
            if theirs.grad is not None:
                torch.testing.assert_close(ours.grad, theirs.grad, rtol=1e-4, atol=1e-7, msg=lambda m, n=name: n + m)


def distil(model, peers, examples, folder: Path, report=None, **phase):
    settings = {"epochs": 4, "batch_size": 6, "objectives": ["labels", "mutual"], **phase}
    teacher = load_teacher("peer", students=peers)
    return cvlm.distill(
        model, teacher, data=examples, out=folder, features=folder.parent / "features", report=report, **settings
    )


def test_peers_train_together_and_are_paid_for(student, colour_vqa, tmp_path):
    examples = colour_vqa(24)
    model, peer = student(0), student(1, "merged")
    before = [copy.deepcopy(one.fusion.state_dict()) for one in (model, peer)]
    towers = (model.vision, peer.vision, peer.text)
    result = distil(model, [peer], examples, tmp_path / "pair")
    for one, old in zip((model, peer), before, strict=True):
        assert any(not torch.equal(value, old[name]) for name, value in one.fusion.state_dict().items())
    assert (model.vision, peer.vision, peer.text) == towers, "towers that were set aside are back"
    assert {"term/labels", "term/mutual", "term/peers"} <= result.log[-1].keys()
    assert result.log[-1]["term/labels"] < result.log[0]["term/labels"]
    alone = distil_alone(student(0), examples, tmp_path / "alone")
    assert result.cost.flops > 1.8 * alone.cost.flops
    assert result.cost.samples == alone.cost.samples


def distil_alone(model, examples, folder):
    settings = {"epochs": 4, "batch_size": 6, "objectives": ["labels"]}
    return cvlm.distill(model, None, data=examples, out=folder, features=folder.parent / "features", **settings)


def test_an_interrupted_phase_ends_in_the_same_peers(student, colour_vqa, tmp_path):
    class KilledError(Exception):
        pass

    def kill(step, steps, loss):
        if step == 9:
            raise KilledError

    examples = colour_vqa(24)
    whole, cut, again = ([student(0, dropout=0.1), student(1, dropout=0.1)] for _ in range(3))
    distil(whole[0], whole[1:], examples, tmp_path / "whole")
    with pytest.raises(KilledError):
        distil(cut[0], cut[1:], examples, tmp_path / "cut", kill)
    for value in [*again[0].fusion.parameters(), *again[1].fusion.parameters()]:
        torch.nn.init.normal_(value)
    distil(again[0], again[1:], examples, tmp_path / "cut")
    for ours, theirs in zip(whole, again, strict=True):
        for name, value in ours.state_dict().items():
            if not name.startswith(("vision.", "text.")):
                assert torch.equal(value, theirs.state_dict()[name]), name


def test_what_peers_refuse(student, colour_vqa, tmp_path):
    with pytest.raises(DistillError, match="at least one further student"):
        PeerTeacher(students=[])
    model = student(0)
    with pytest.raises(DistillError, match="a student stands twice among the peers"):
        PeerTeacher(students=[model, model])
    with pytest.raises(DistillError, match="same task and the same answers"):
        PeerTeacher(students=[model, student(1, answers=ANSWERS[::-1])])
    with pytest.raises(DistillError, match="their targets cannot be stored"):
        PeerTeacher(students=[model]).fingerprint  # noqa: B018
    with pytest.raises(DistillError, match="peers speak only inside the phase"):
        PeerTeacher(students=[model]).prepare([], [])
    with pytest.raises(DistillError, match=r"needs text_to_image of the teacher peer \(1 further student\(s\)\)"):
        distil(model, [student(1)], colour_vqa(12), tmp_path / "a", objectives=["cross_attention"])
    with pytest.raises(CvlmError, match="the student cannot be its own peer"):
        distil(model, [model], colour_vqa(12), tmp_path / "a")
