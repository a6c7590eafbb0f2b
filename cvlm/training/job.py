"""What one phase needs, and how its pairs become batches."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from transformers import TrainingArguments

from cvlm.config import EngineSpec, PhaseSpec
from cvlm.data.order import EpochOrder
from cvlm.data.stream_pairs import StreamPair
from cvlm.data.streaming import Stream, StreamOrder
from cvlm.model import CVLM
from cvlm.training.inputs import ModelInputs
from cvlm.training.target import LiveTarget, TargetSource
from distill import Objective, Request

Report = Callable[[int, int, float | None], None]


@dataclass(frozen=True, kw_only=True)
class PhaseJob:
    """Everything that one phase needs.

    Attributes:
        student: trained in place.
        phase: objectives aside, how to train.
        objectives: the terms of the loss; adapters are made on the way.
        inputs: how to feed the student.
        target: where the teacher's signal comes from; None without a teacher.
        stream: where the training pairs come from, if they are streamed. Inputs and target then hold its first pairs,
            and nothing that is stored.
        engine: precision, DeepSpeed, device.
        seed: of data order, dropout and adapters.
        folder: checkpoints and TensorBoard events; checkpoints are deleted at the end.
        report: called with (step, steps, loss).
    """

    student: CVLM
    phase: PhaseSpec
    objectives: Sequence[Objective]
    inputs: ModelInputs
    target: TargetSource | None = None
    stream: Stream | None = None
    engine: EngineSpec = field(default_factory=EngineSpec)
    seed: int = 0
    folder: Path
    report: Report | None = None

    @property
    def index(self) -> np.ndarray[Any, Any]:
        """The pairs that this phase trains on, as far as the teacher knows them; of a stream, those among the first."""
        examples = self.inputs.examples
        index = np.arange(len(examples)) if self.phase.pairs == "all" else examples.labelled
        return index if self.target is None else np.setdiff1d(index, self.target.missing, assume_unique=True)

    @property
    def size(self) -> int:
        """How many pairs an epoch has."""
        return self.stream.samples if self.stream is not None else len(self.index)


def collate(job: PhaseJob, positions: Sequence[int], teacher_request: Request) -> dict[str, Any]:
    """Turn pair indices into one batch of CPU tensors."""
    index = np.asarray(positions, dtype=np.int64)
    batch = job.inputs.pairs(index)
    batch["labels"] = torch.from_numpy(job.inputs.examples.labels[index])
    batch["examples"] = len(index)
    batch["teacher"] = job.target.fetch(index, teacher_request) if job.target is not None else None
    return batch


def collate_stream(job: PhaseJob, pairs: Sequence[StreamPair], teacher_request: Request) -> dict[str, Any]:
    """Turn pairs that came by into one batch of CPU tensors: they are a small split of their own."""
    assert job.stream is not None
    here = job.stream.examples(pairs)
    assert job.target is None or isinstance(job.target, LiveTarget), "nothing is stored about a stream"
    target = None if job.target is None else replace(job.target, examples=here)
    job = replace(job, inputs=replace(job.inputs, examples=here), target=target)
    return collate(job, range(len(pairs)), teacher_request)


def order_of(job: PhaseJob, arguments: TrainingArguments, done: int) -> EpochOrder | StreamOrder:
    """Return the order of the pairs behind `done` optimiser steps, as this process sees it."""
    accumulate = arguments.gradient_accumulation_steps
    common: dict[str, Any] = {
        "seed": job.seed,
        "batch": micro_batch(job),
        "batches": arguments.max_steps * accumulate,
        "rank": arguments.process_index,
        "world": arguments.world_size,
        "start": done * accumulate,
    }
    if job.stream is None:
        return EpochOrder(index=job.index, **common)
    return StreamOrder(
        stream=job.stream,
        known=job.phase.pairs == "labelled" and job.stream.task != "retrieval",  # a caption is its own label
        file=job.folder / f"skipped-{arguments.process_index}.jsonl",
        **common,
    )


def micro_batch(job: PhaseJob) -> int:
    """Return the pairs per forward pass over all processes; fewer than `batch_size` where there are so few pairs."""
    return min(job.phase.batch_size, max(1, job.size // job.phase.accumulate))
