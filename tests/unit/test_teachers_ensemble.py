"""Ensembles: the mean of probabilities, one member's attention, and members that do not go together."""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import pytest
import torch
from scipy.special import softmax

from distill import DistillError, Request, Signal
from distill.layout import TextLayout
from distill.teachers.base import PairKey
from distill.teachers.ensemble import EnsembleTeacher
from distill.teachers.table import TableTeacher

ANSWERS = ("red", "green", "blue")


class Fixed:
    """A teacher that always says the same, and remembers what it was asked."""

    def __init__(self, name: str, depth: int = 0, answers: Any = ANSWERS, **fields: Any) -> None:
        self.name, self.depth, self.fingerprint = name, depth, f"of {name}"
        self._signal = Signal(**fields)
        self.fields = self._signal.fields
        if answers is not None:
            self.answers = answers
        self.asked: list[Request] = []

    def prepare(self, images: Sequence[Any], texts: Sequence[str]) -> Mapping[str, Any]:
        return {"number": torch.tensor(len(images)), "texts": list(texts)}

    def signal(self, inputs: Mapping[str, Any], request: Request) -> Signal:
        self.asked.append(request)
        return self._signal

    def to(self, device: Any) -> "Fixed":
        return self


def logits(seed: int, rows: int = 4, columns: int = 3) -> torch.Tensor:
    return torch.tensor(np.random.default_rng(seed).normal(0, 3, (rows, columns)), dtype=torch.float32)


def ask(teacher: EnsembleTeacher, *fields: str) -> Signal:
    return teacher.signal(teacher.prepare([None] * 4, ["?"] * 4), Request(fields=frozenset(fields or {"logits"})))


@pytest.mark.parametrize("weights", [None, (3.0, 1.0, 0.5)])
@pytest.mark.parametrize("field", ["logits", "similarity"])
def test_probabilities_are_averaged(field, weights):
    values = [logits(seed, columns=3 if field == "logits" else 4) for seed in range(3)]
    members = [Fixed(str(i), **{field: value}) for i, value in enumerate(values)]
    teacher = EnsembleTeacher(members=members, weights=weights)
    shares = np.array(weights or (1, 1, 1)) / sum(weights or (1, 1, 1))
    wanted = sum(w * softmax(v.double().numpy(), axis=-1) for w, v in zip(shares, values, strict=True))
    given = getattr(ask(teacher, field), field)
    np.testing.assert_allclose(softmax(given.double().numpy(), axis=-1), wanted, rtol=1e-5)
    np.testing.assert_allclose(given.exp().sum(-1), 1, rtol=1e-5)
    assert teacher.fields == {field}


def test_equal_members_say_what_one_says():
    value = logits(0)
    teacher = EnsembleTeacher(members=[Fixed("a", logits=value), Fixed("b", logits=value)])
    torch.testing.assert_close(ask(teacher).logits, value.log_softmax(-1))


def test_maps_come_from_the_chosen_member_alone():
    maps = {0: torch.rand(4, 2, 5, 6).softmax(-1)}
    layout = TextLayout(spans=torch.zeros(4, 5, 2, dtype=torch.long))
    plain = Fixed("plain", logits=logits(0), text_to_image=maps)
    chosen = Fixed("chosen", depth=3, logits=logits(1), text_to_image=maps, text_layout=layout, hidden=maps)
    teacher = EnsembleTeacher(members=[plain, chosen], attention=1)
    assert teacher.depth == 3
    assert teacher.fields == {"logits", "text_to_image", "text_layout"}
    signal = teacher.signal(
        teacher.prepare([None] * 4, ["?"] * 4),
        Request(fields=frozenset({"logits", "text_to_image"}), attention_layers=frozenset({2})),
    )
    assert signal.text_to_image is not None
    assert signal.text_to_image[0] is maps[0]
    assert signal.text_layout is layout
    assert signal.hidden is None
    assert plain.asked == [Request(fields=frozenset({"logits"}))], "nobody else records attention"
    assert chosen.asked[0].attention_layers == {2}
    silent = EnsembleTeacher(members=[plain, chosen])
    assert silent.fields == {"logits"}
    assert silent.depth == 0


def test_a_member_that_looks_pairs_up(tmp_path):
    np.savez(tmp_path / "t.npz", probabilities=[[0.9, 0.05, 0.05], [0.2, 0.2, 0.6]], ids=["a", "b"], answers=ANSWERS)
    table = TableTeacher(path=tmp_path / "t.npz", answers=ANSWERS, skip=0.5)
    value = logits(0, rows=2)
    teacher = EnsembleTeacher(members=[Fixed("model", logits=value), table])
    keys = [PairKey(id=name, picture="", text=f"{name}?") for name in ("a", "b")]
    inputs = teacher.look_up(keys, lambda: ["first picture", "second picture"])
    assert inputs["0"]["texts"] == ["a?", "b?"]
    wanted = (value.softmax(-1) + torch.tensor([[0.9, 0.05, 0.05], [0.2, 0.2, 0.6]])) / 2
    torch.testing.assert_close(teacher.signal(inputs, Request()).logits.softmax(-1), wanted)
    assert teacher.keyed
    assert teacher.missing([*keys, PairKey(id="c", picture="", text="c?")]) == [2]
    assert not EnsembleTeacher(members=[Fixed("a", logits=value), Fixed("b", logits=value)]).keyed


def test_the_fingerprint_follows_members_weights_and_attention():
    maps = {0: torch.rand(4, 2, 5, 6)}
    members = [Fixed("a", logits=logits(0), text_to_image=maps), Fixed("b", logits=logits(0), text_to_image=maps)]
    settings = [{}, {"weights": (1, 2)}, {"attention": 0}, {"attention": 1}]
    prints = [EnsembleTeacher(members=members, **one).fingerprint for one in settings]
    prints.append(EnsembleTeacher(members=members[::-1]).fingerprint)
    assert len(set(prints)) == 5
    assert EnsembleTeacher(members=members, weights=(2, 2)).fingerprint == prints[0]


@pytest.mark.parametrize(
    ("members", "settings", "message"),
    [
        ([{}], {}, "needs at least two members, got 1"),
        ([{}, {}], {"weights": (1,)}, r"weights are \[1.0\]; give one finite number above 0 for each of the 2 members"),
        ([{}, {}], {"weights": (1, 0)}, "weights are"),
        (
            [{}, {"answers": ("green", "red", "blue")}],
            {},
            "agree in their answers, in the same order; m0 and m1 do not",
        ),
        (
            [{"similarity": True}, {}],
            {},
            "must all give logits, or all similarity: m0 gives similarity; m1 gives logits",
        ),
        ([{}, {}], {"attention": 2}, "attention is 2; it is the place of one of the 2 members, counted from 0"),
        ([{}, {}], {"attention": 1}, "attention is 1, and m1 gives no maps"),
    ],
)
def test_what_does_not_go_together(members, settings, message):
    made = [
        Fixed(
            f"m{i}",
            answers=member.get("answers", ANSWERS),
            **{"similarity" if "similarity" in member else "logits": logits(i)},
        )
        for i, member in enumerate(members)
    ]
    with pytest.raises(DistillError, match=message):
        EnsembleTeacher(members=made, **settings)


def test_a_member_that_does_not_say_its_answers_must_have_as_many():
    teacher = EnsembleTeacher(
        members=[Fixed("a", answers=None, logits=logits(0, columns=5)), Fixed("b", logits=logits(1))]
    )
    assert teacher.answers == ANSWERS
    with pytest.raises(DistillError, match=r"give logits of different shapes: \[\(4, 3\), \(4, 5\)\]"):
        ask(teacher)
