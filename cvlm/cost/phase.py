"""The record of what one phase, or one job of it, cost."""

from collections.abc import Sequence
from dataclasses import dataclass, fields
from functools import reduce
from typing import Any, Literal

from cvlm.errors import CvlmError

EnergySource = Literal["measured", "estimated"]


@dataclass(frozen=True, kw_only=True)
class PhaseCost:
    """What a phase cost. All fields but ``device`` appear in cost.json under their own names.

    Attributes:
        flops: FLOPs, two per multiply-add.
        seconds: Wall time.
        device_seconds: Wall time times devices.
        energy_joules: Energy of the computing devices; None where no counter and no public power figure exists.
        energy_source: "measured" by hardware counters, or "estimated" as soon as any part of the sum is.
        peak_memory_bytes: Largest memory of one device (CUDA: allocated tensors; else resident memory of the process
            and its children).
        samples: Samples processed, repeats included.
        device: Name of the device, several joined by " + ".
    """

    flops: int = 0
    seconds: float = 0.0
    device_seconds: float = 0.0
    energy_joules: float | None = 0.0
    energy_source: EnergySource = "estimated"
    peak_memory_bytes: int = 0
    samples: int = 0
    device: str = ""

    def __add__(self, other: "PhaseCost") -> "PhaseCost":
        """The cost of one after the other: everything is summed, memory is the larger."""
        return _merge(self, other, self.seconds + other.seconds)

    def to_json(self) -> dict[str, Any]:
        """Return a JSON object that `from_json` reads."""
        return {field.name: getattr(self, field.name) for field in fields(self)}

    @classmethod
    def from_json(cls, record: dict[str, Any]) -> "PhaseCost":
        """Read what `to_json` wrote.

        Raises:
            CvlmError: A key is unknown or missing, or the energy source is neither of the two.
        """
        known = {field.name for field in fields(cls)}
        if wrong := sorted(known.symmetric_difference(record)):
            raise CvlmError(f"a cost record has unknown or missing keys: {', '.join(wrong)}. Delete it and run again.")
        if record["energy_source"] not in ("measured", "estimated"):
            raise CvlmError(f"energy_source {record['energy_source']!r} is neither 'measured' nor 'estimated'.")
        return cls(**record)


def merge_ranks(costs: Sequence[PhaseCost]) -> PhaseCost:
    """Merge the records of processes that ran at the same time: wall time is the longest, the rest is summed.

    Args:
        costs: One record per process, at least one; as `PhaseMeter` makes them, each counts its own device, and only
            local rank 0 of each node counts the node's energy.
    """
    return reduce(lambda left, right: _merge(left, right, max(left.seconds, right.seconds)), costs)


def _merge(left: PhaseCost, right: PhaseCost, seconds: float) -> PhaseCost:
    estimated = "estimated" in (left.energy_source, right.energy_source)
    unknown = left.energy_joules is None or right.energy_joules is None
    names = [name for cost in (left, right) for name in cost.device.split(" + ") if name]
    return PhaseCost(
        flops=left.flops + right.flops,
        seconds=seconds,
        device_seconds=left.device_seconds + right.device_seconds,
        energy_joules=None if unknown else (left.energy_joules or 0.0) + (right.energy_joules or 0.0),
        energy_source="estimated" if estimated else "measured",
        peak_memory_bytes=max(left.peak_memory_bytes, right.peak_memory_bytes),
        samples=left.samples + right.samples,
        device=" + ".join(dict.fromkeys(names)),
    )
