"""cost.json: the costs of a run, kept on disk from job to job."""

import json
import os
from collections.abc import Sequence
from functools import reduce
from operator import add
from pathlib import Path
from typing import Any

from cvlm.cost.machine import machine_info
from cvlm.cost.phase import PhaseCost
from cvlm.cost.references import PRETRAINING_RUNS, Reference, compare
from cvlm.errors import CvlmError
from cvlm.files import write_atomic

PHASES = ("encode", "teacher", "targets", "finetune", "distill", "chain", "evaluate")
"""Names of phases that CVLM itself books: encoding by frozen towers done once, fine-tuning the teacher, the teacher's
forwards for distillation, phase 1, phase 2, its chain, evaluation. Others are allowed."""


class Ledger:
    """The costs of a run: a phase is made of jobs, such as one per seed.

    Every change is written at once and atomically. Booking a job again replaces it, so that a resumed or repeated job
    does not count twice. One process writes (rank 0); there is no lock.
    """

    def __init__(self, path: str | os.PathLike[str], references: Sequence[Reference] = PRETRAINING_RUNS) -> None:
        """Open a ledger; the file need not exist yet.

        Args:
            path: The cost.json file.
            references: Published runs to compare with.

        Raises:
            CvlmError: The file is there but is not a ledger.
        """
        self.path = Path(path)
        self._references = references
        self._read()

    def add(self, phase: str, key: str, cost: PhaseCost) -> None:
        """Book a job, in place of an earlier one with the same phase and key, and write the file.

        Args:
            phase: Such as "finetune".
            key: Job within the phase, such as "seed0".
            cost: Whole cost of the job, what was spent before an interruption included.
        """
        if not phase or not key:
            raise ValueError(f"phase {phase!r} and key {key!r} must not be empty")
        self._read()  # another Ledger of this process may have written since
        self._jobs.setdefault(phase, {})[key] = cost
        self._write()

    def add_baseline(self, name: str, cost: PhaseCost, *, source: str, assumptions: str = "") -> None:
        """Book a run that was measured here and that the total is to be compared with, and write the file.

        Args:
            name: What was run, such as "full fine-tuning of both encoders"; the same name again replaces it.
            cost: Its whole cost.
            source: Where the record is, such as the name of its run folder.
            assumptions: What to know when reading the ratio.
        """
        self._read()
        self._measured[name] = {"cost": cost.to_json(), "source": source, "assumptions": assumptions}
        self._write()

    def get(self, phase: str, key: str) -> PhaseCost | None:
        """The cost booked for a job, None if there is none; a resumed meter starts from it."""
        return self._jobs.get(phase, {}).get(key)

    def phase(self, name: str) -> PhaseCost:
        """The sum over the jobs of a phase, an empty cost if it has none."""
        return _sum(self._jobs.get(name, {}).values())

    def total(self) -> PhaseCost:
        """The sum over all phases. Measured baselines are not part of it."""
        return _sum(cost for jobs in self._jobs.values() for cost in jobs.values())

    def to_json(self) -> dict[str, Any]:
        """The content of cost.json: phases, total, baselines, and what machine wrote it."""
        total = self.total()
        return {
            "phases": {name: self._phase_json(name) for name in self._jobs},
            "total": _public(total),
            "baselines": [*self._measured_rows(total), *compare(total, self._references)],
            "machine": machine_info(),
        }

    def _phase_json(self, name: str) -> dict[str, Any]:
        jobs = {key: cost.to_json() for key, cost in self._jobs[name].items()}
        return {**_public(self.phase(name)), "jobs": jobs}

    def _measured_rows(self, total: PhaseCost) -> list[dict[str, Any]]:
        rows = []
        for name, entry in self._measured.items():
            cost = PhaseCost.from_json(entry["cost"])
            ratio_time = total.device_seconds / cost.device_seconds if cost.device_seconds else None
            rows.append(
                {
                    "name": name,
                    "kind": "measured",
                    "device_hours": cost.device_seconds / 3600,
                    "flops": cost.flops,
                    "ratio_flops": total.flops / cost.flops if cost.flops and total.flops else None,
                    "ratio_device_hours": ratio_time,
                    "source": entry["source"],
                    "assumptions": entry["assumptions"],
                    "cost": entry["cost"],
                }
            )
        return rows

    def _read(self) -> None:
        self._jobs: dict[str, dict[str, PhaseCost]] = {}
        self._measured: dict[str, dict[str, Any]] = {}
        if not self.path.exists():
            return
        try:
            content = json.loads(self.path.read_text(encoding="utf-8"))
            for name, phase in content["phases"].items():
                self._jobs[name] = {key: PhaseCost.from_json(record) for key, record in phase["jobs"].items()}
            for row in content["baselines"]:
                if row["kind"] == "measured":
                    self._measured[row["name"]] = {key: row[key] for key in ("cost", "source", "assumptions")}
        except (ValueError, KeyError, TypeError, AttributeError, CvlmError) as error:
            raise CvlmError(
                f"{self.path} is not a cost ledger ({type(error).__name__}: {error}). Move it away to start a new one."
            ) from error

    def _write(self) -> None:
        self.path.parent.mkdir(parents=True, exist_ok=True)
        content = json.dumps(self.to_json(), indent=2, allow_nan=False) + "\n"
        write_atomic(self.path, content.encode())


def _sum(costs: Any) -> PhaseCost:
    booked = list(costs)
    return reduce(add, booked) if booked else PhaseCost()


def _public(cost: PhaseCost) -> dict[str, Any]:
    """The record without the device, which a sum over jobs may not have one of."""
    record = cost.to_json()
    del record["device"]
    return record
