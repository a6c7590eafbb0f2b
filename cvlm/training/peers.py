"""Students that train together, each taught by the others: deep mutual learning (Zhang et al. 2018).

Each step runs every peer once, and each one learns from what the others said in the same step, without gradient to
them. The paper updates one network after the other, and lets the first speak again before the second learns from it.
All at once needs fewer forward passes and no order among peers; what later ones are compared with is one update older.
"""

import copy
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from PIL.Image import Image
from torch import Tensor, nn

from cvlm.model import CVLM
from cvlm.training.inputs import ModelInputs, move
from cvlm.training.module import PhaseModule
from cvlm.training.target import NOTHING, Indices
from distill import DistillError, Objective, Request, Signal

SHARED = frozenset({"logits", "similarity"})
"""What peers say to each other."""


class PeerTeacher:
    """Further students that train beside the one that is kept; the `Teacher` of a phase before it begins.

    Args:
        students: the further ones. They must answer over the student's vocabulary.

    Raises:
        DistillError: there are none, one stands twice, or they differ in task or answers.
    """

    depth = 0

    def __init__(self, *, students: Sequence[CVLM]) -> None:
        self.students = tuple(students)
        if not self.students:
            raise DistillError("teacher 'peer' needs at least one further student")
        if len({id(student) for student in self.students}) < len(self.students):
            raise DistillError("teacher 'peer': a student stands twice among the peers; compose another one")
        if len({(student.task, student.answers) for student in self.students}) > 1:
            raise DistillError("teacher 'peer': peers must have the same task and the same answers in the same order")
        self.name = f"peer ({len(self.students)} further student(s))"
        self.answers = self.students[0].answers
        self.pictures = self.students[0].facts.pictures
        self.fields = frozenset.intersection(SHARED, *(student.fields for student in self.students))

    @property
    def fingerprint(self) -> str:
        """Refuse: peers change in every step."""
        raise DistillError("what peers say changes in every step; their targets cannot be stored")

    def prepare(self, images: Sequence[Image], texts: Sequence[str]) -> Mapping[str, Any]:
        """Refuse: peers see what the phase reads for them."""
        raise DistillError("peers speak only inside the phase that trains them; see cvlm.training.PeersTarget")

    def signal(self, inputs: Mapping[str, Any], request: Request) -> Signal:
        """Refuse, as `prepare`."""
        raise DistillError("peers speak only inside the phase that trains them; see cvlm.training.PeersTarget")

    def to(self, device: Any) -> "PeerTeacher":
        """Stay: peers live where the student does."""
        return self


@dataclass(frozen=True, kw_only=True)
class PeerBatch(Signal):
    """What the peers are shown, in a teacher's place: their signals are made inside the module that trains them.

    Attributes:
        inputs: peer's number -> its `{"image", "text"}` inputs.
    """

    inputs: Mapping[str, Any]

    def to(self, device: Any) -> "PeerBatch":
        """Move the inputs."""
        return PeerBatch(inputs=move(dict(self.inputs), device))


@dataclass(frozen=True, kw_only=True)
class PeersTarget:
    """Feeds peers beside the student; a `TargetSource`.

    Attributes:
        students: the peers.
        inputs: how to feed each of them.
    """

    students: tuple[CVLM, ...]
    inputs: tuple[ModelInputs, ...]
    depth: int = 0

    @property
    def answers(self) -> tuple[str, ...]:
        """The peers' vocabulary."""
        return self.students[0].answers

    @property
    def missing(self) -> Indices:
        """Peers read every pair."""
        return NOTHING

    def fetch(self, index: Indices, request: Request) -> dict[str, Any]:
        """Read every peer's inputs."""
        return {str(i): inputs.pairs(index) for i, inputs in enumerate(self.inputs)}

    def signal(self, batch: Mapping[str, Any], request: Request) -> PeerBatch:
        """Hand the inputs on."""
        return PeerBatch(inputs=batch)

    def flops(self, batch: Any, request: Request) -> int:
        """Count nothing here: peers run inside the module whose steps are counted."""
        return 0


class PeerModule(PhaseModule):
    """A student, its peers, and the terms of each one's loss.

    A term that reads the teacher is averaged over the other peers (as in the paper). The losses are summed, so each
    peer gets the gradient of its own; only the clipping of gradients looks at all of them together.

    Args:
        student: the model that is kept.
        objectives: its terms; peers get copies.
        request: what every forward pass records.
        peers: the further students.
    """

    def __init__(self, student: CVLM, objectives: Sequence[Objective], request: Request, peers: Sequence[CVLM]) -> None:
        super().__init__(student, objectives, request)
        self._others = [PhaseModule(peer, copy.deepcopy(list(objectives)), request) for peer in peers]
        self.peers = nn.ModuleList(self._others)

    @property
    def reads_teacher(self) -> bool:
        """Always: what the peers are shown stands in the teacher's place."""
        return True

    def forward(
        self, image: Any, text: Any, labels: Tensor | None, teacher: Signal | None, divisors: Sequence[float]
    ) -> dict[str, Tensor]:
        """Run every peer once and compare each with the others; see `PhaseModule.forward`.

        Returns:
            `loss`, the sum over all peers; the kept student's terms; and `peers`, the mean loss of the others.
        """
        signals = self._signals(image, text, labels, teacher)
        own, *others = (
            self._against(module, signals, place, labels, divisors)
            for place, module in enumerate([self, *self._others])
        )
        others_loss = torch.stack([values["loss"] for values in others])
        return {**own, "loss": own["loss"] + others_loss.sum(), "peers": others_loss.mean().detach()}

    def prepare(self, image: Any, text: Any, labels: Tensor | None, teacher: Signal | None) -> None:
        """Make every peer's adapters from one batch."""
        signals = self._signals(image, text, labels, teacher)
        for place, module in enumerate([self, *self._others]):
            for objective in module.objectives:
                objective.prepare(signals[place], signals[place - 1])  # type: ignore[operator]

    def _signals(self, image: Any, text: Any, labels: Tensor | None, teacher: Signal | None) -> list[Signal]:
        assert isinstance(teacher, PeerBatch), "peers are fed by a PeersTarget"
        signals = [self.student(image, text, request=self.request, labels=labels)]
        for number, module in enumerate(self._others):
            shown = teacher.inputs[str(number)]
            signals.append(module.student(shown["image"], shown["text"], request=self.request, labels=labels))
        return signals

    def _against(
        self, module: Any, signals: Sequence[Signal], place: int, labels: Tensor | None, divisors: Sequence[float]
    ) -> dict[str, Tensor]:
        """Compare one peer's signal with each of the others', and average."""
        others = [_detached(signal) for other, signal in enumerate(signals) if other != place]
        values = [module.compare(signals[place], other, labels, divisors) for other in others]
        return {name: torch.stack([one[name] for one in values]).mean(0) for name in values[0]}


def _detached(signal: Signal) -> Signal:
    """Return what others may hear of a signal (`SHARED`), without its graph."""

    def said(value: Tensor | None) -> Tensor | None:
        return None if value is None else value.detach()

    return Signal(logits=said(signal.logits), similarity=said(signal.similarity))
