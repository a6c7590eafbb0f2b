"""The weight of a term over time: a pure function of how much of a phase is done, so that resuming changes nothing."""

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from distill.errors import DistillError

SCHEDULES = ("constant", "linear", "cosine", "switch")
KEYS = ("schedule", "from", "to", "at")


@dataclass(frozen=True, kw_only=True)
class WeightSchedule:
    """A weight that moves from one value to another.

    `linear` and `cosine` move until the share `at` of the steps is done and stay there; `cosine` begins and ends flat.
    `switch` jumps there, as DoKTra's two stages do (Choi et al. 2022). `constant` stays at the first value.

    Attributes:
        schedule: one of `SCHEDULES`.
        start: the first value; `from` in a recipe.
        end: the last value; `to` in a recipe.
        at: share of the phase's steps.

    Raises:
        DistillError: the schedule is unknown, a weight is negative or not finite, or `at` is not within [0, 1].
    """

    schedule: str
    start: float
    end: float
    at: float = 1.0

    def __post_init__(self) -> None:
        if self.schedule not in SCHEDULES:
            raise DistillError(f"weight: schedule is {self.schedule!r}; use one of {', '.join(SCHEDULES)}")
        for name, value in (("from", self.start), ("to", self.end)):
            if not _is_number(value) or not 0 <= value < math.inf:
                raise DistillError(f"weight: {name!r} is {value!r}; it must be a finite number that is not negative")
        if not _is_number(self.at) or not 0 <= self.at <= 1:
            raise DistillError(f"weight: 'at' is {self.at!r}; it must be a share of the phase's steps, from 0 to 1")
        if self.schedule == "constant" and self.start != self.end:
            raise DistillError(
                f"weight: a constant one cannot go from {self.start} to {self.end}; leave 'to' out, or take linear"
            )

    def __call__(self, progress: float) -> float:
        """Return the weight when the share `progress` of the phase's steps is done."""
        if progress >= self.at:
            return self.end
        if self.schedule in ("constant", "switch"):
            return self.start
        done = progress / self.at
        if self.schedule == "cosine":
            done = (1 - math.cos(math.pi * done)) / 2
        return self.start + (self.end - self.start) * done


Weight = float | WeightSchedule


def parse_weight(value: Any) -> Weight:
    """Read a weight: a number, or `{schedule: switch, from: 0.0, to: 1.0, at: 0.7}`.

    `from` is needed, and except for `constant` also `to`; `at` is needed for `switch` and 1 elsewhere.

    Raises:
        DistillError: it is neither, or a key or value of it is wrong.
    """
    if isinstance(value, WeightSchedule):
        return value
    if not isinstance(value, Mapping):
        if not _is_number(value) or not 0 <= value < math.inf:
            raise DistillError(f"weight is {value}, it must be finite and not negative, or a mapping with a schedule")
        return float(value)
    unknown = [key for key in value if key not in KEYS]
    if unknown:
        raise DistillError(f"weight has no key {unknown[0]!r}; known: {', '.join(KEYS)}")
    kind = value.get("schedule")
    needed = {"constant": KEYS[:2], "switch": KEYS}.get(str(kind), KEYS[:3])
    missing = [key for key in needed if key not in value]
    if missing:
        raise DistillError(f"weight {dict(value)} lacks {', '.join(missing)}")
    return WeightSchedule(
        schedule=str(kind), start=value["from"], end=value.get("to", value["from"]), at=value.get("at", 1.0)
    )


def weight_at(weight: Weight, progress: float) -> float:
    """Return a weight when the share `progress` of the phase's steps is done; never computed from earlier values."""
    return weight(progress) if isinstance(weight, WeightSchedule) else weight


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)
