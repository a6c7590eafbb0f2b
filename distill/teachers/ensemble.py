"""Several teachers that speak with one voice: their probabilities, averaged."""

import math
from collections.abc import Callable, Mapping, Sequence
from hashlib import sha256
from typing import Any

import torch
from PIL.Image import Image
from torch import Tensor

from distill.errors import DistillError
from distill.signal import Request, Signal
from distill.teachers.base import PairKey, Teacher, as_keyed

MAPS = frozenset({"text_to_image", "image_to_text", "text_layout", "image_layout"})
AVERAGED = ("logits", "similarity")


class EnsembleTeacher:
    """The weighted mean of its members' distributions; see `distill.Teacher`.

    `logits` is the logarithm of the mean of the members' softmax over answers (Hinton et al. 2015, section 1, the
    arithmetic mean of predictive distributions); `similarity` likewise of the softmax over each picture's row of the
    batch. Attention maps are not averaged, since layers and heads of different models do not correspond: one member may
    be chosen to give its own.

    Args:
        members: the teachers.
        weights: one positive number per member, scaled to sum to one; None weighs them alike.
        attention: place of the member whose attention maps are given, counted from 0; None gives none.

    Raises:
        DistillError: the members answer over different vocabularies, share no field, or a setting does not fit.
    """

    def __init__(
        self, *, members: Sequence[Teacher], weights: Sequence[float] | None = None, attention: int | None = None
    ) -> None:
        self.members = list(members)
        if len(self.members) < 2:
            raise DistillError(f"teacher 'ensemble' needs at least two members, got {len(self.members)}")
        self.weights = _scaled(weights, len(self.members))
        self.name = f"ensemble ({', '.join(member.name for member in self.members)})"
        self.answers = _common(self.members, "answers", None)
        self.pictures = _common(self.members, "pictures", 1)
        shared = frozenset.intersection(*(member.fields for member in self.members)) & set(AVERAGED)
        if not shared:
            given = "; ".join(f"{member.name} gives {', '.join(sorted(member.fields))}" for member in self.members)
            raise DistillError(f"members of an ensemble must all give logits, or all similarity: {given}")
        if attention is not None and not 0 <= attention < len(self.members):
            raise DistillError(
                f"teacher 'ensemble': attention is {attention}; it is the place of one of the {len(self.members)} "
                "members, counted from 0"
            )
        self._chosen = None if attention is None else self.members[attention]
        if self._chosen is not None and not self._chosen.fields & MAPS:
            raise DistillError(f"teacher 'ensemble': attention is {attention}, and {self._chosen.name} gives no maps")
        self.fields = shared | (self._chosen.fields & MAPS if self._chosen is not None else frozenset())
        self.depth = self._chosen.depth if self._chosen is not None else 0

    @property
    def fingerprint(self) -> str:
        """SHA-256 over the members' fingerprints, their weights, and which one gives attention."""
        chosen = None if self._chosen is None else self.members.index(self._chosen)
        parts = [member.fingerprint for member in self.members]
        return sha256(f"{parts}|{self.weights}|{chosen}".encode()).hexdigest()

    @property
    def keyed(self) -> bool:
        """Whether a member looks pairs up."""
        return any(as_keyed(member) is not None for member in self.members)

    def missing(self, keys: Sequence[PairKey]) -> list[int]:
        """Return the places of pairs that at least one member knows nothing about."""
        found = [keyed.missing(keys) for member in self.members if (keyed := as_keyed(member)) is not None]
        return sorted({place for places in found for place in places})

    def prepare(self, images: Sequence[Image], texts: Sequence[str]) -> Mapping[str, Any]:
        """Prepare pairs for every member."""
        return {str(i): dict(member.prepare(images, texts)) for i, member in enumerate(self.members)}

    def look_up(self, keys: Sequence[PairKey], load: Callable[[], Sequence[Image]]) -> Mapping[str, Any]:
        """Prepare pairs for every member; members that look pairs up get the keys."""
        texts = [key.text for key in keys for _ in range(self.pictures)]
        pictures: Sequence[Image] | None = None
        inputs: dict[str, Any] = {}
        for i, member in enumerate(self.members):
            keyed = as_keyed(member)
            if keyed is not None:
                inputs[str(i)] = dict(keyed.look_up(keys, load))
            else:
                pictures = load() if pictures is None else pictures
                inputs[str(i)] = dict(member.prepare(pictures, texts))
        return inputs

    def signal(self, inputs: Mapping[str, Any], request: Request) -> Signal:
        """Ask every member, and average in probability space."""
        plain = Request(fields=request.fields & set(AVERAGED))
        combined: dict[str, list[Tensor]] = {name: [] for name in plain.fields}
        own = Signal()
        for i, member in enumerate(self.members):
            chosen = member is self._chosen
            signal = member.signal(inputs[str(i)], request if chosen else plain)
            if chosen:
                own = signal
            for name, parts in combined.items():
                value = getattr(signal, name)
                if value is None:
                    raise DistillError(f"the member {member.name} promised {name!r} and gave none")
                parts.append(value.float())
        averaged: dict[str, Any] = {name: self._log_mean(name, parts) for name, parts in combined.items()}
        kept = {name: getattr(own, name) for name in MAPS & self.fields}
        return Signal(**averaged, **kept, pictures=own.pictures)

    def to(self, device: Any) -> "EnsembleTeacher":
        """Move every member."""
        places = [self._chosen is member for member in self.members]
        self.members = [member.to(device) for member in self.members]
        self._chosen = next((m for m, chosen in zip(self.members, places, strict=True) if chosen), None)
        return self

    def _log_mean(self, name: str, parts: Sequence[Tensor]) -> Tensor:
        """Return `log sum_i w_i softmax(z_i)` over the last axis."""
        shapes = {tuple(part.shape) for part in parts}
        if len(shapes) > 1:
            raise DistillError(f"the members of {self.name} give {name} of different shapes: {sorted(shapes)}")
        logs = [part.log_softmax(-1) + math.log(w) for part, w in zip(parts, self.weights, strict=True)]
        return torch.stack(logs).logsumexp(0)


def _scaled(weights: Sequence[float] | None, members: int) -> tuple[float, ...]:
    given = [1.0] * members if weights is None else [float(weight) for weight in weights]
    if len(given) != members or not all(0 < weight < math.inf for weight in given):
        raise DistillError(
            f"teacher 'ensemble': weights are {given}; give one finite number above 0 for each of the {members} members"
        )
    return tuple(weight / sum(given) for weight in given)


def _common(members: Sequence[Teacher], attribute: str, default: Any) -> Any:
    """Return what all members that say so agree on."""
    said = [(member.name, getattr(member, attribute, default)) for member in members]
    known = [(name, tuple(value) if attribute == "answers" else value) for name, value in said if value is not None]
    for name, value in known[1:]:
        if value != known[0][1]:
            raise DistillError(
                f"members of an ensemble must agree in their {attribute}, in the same order; {known[0][0]} and {name} "
                "do not"
            )
    return known[0][1] if known else None
