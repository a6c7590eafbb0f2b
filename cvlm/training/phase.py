"""One phase: train a student on a split with a list of objectives, resuming where an earlier attempt was stopped."""

import copy
import json
import logging
import math
import os
import shutil
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from hashlib import sha256
from pathlib import Path
from typing import Any

import numpy as np
import torch
from accelerate.utils import gather_object
from torch.utils.tensorboard import SummaryWriter
from transformers import TrainingArguments
from transformers.integrations import TensorBoardCallback
from transformers.trainer_callback import PrinterCallback, ProgressCallback

from cvlm.config import EngineSpec, PhaseSpec
from cvlm.cost import PhaseCost, PhaseMeter, count_flops, merge_ranks
from cvlm.errors import CvlmError
from cvlm.model import CVLM
from cvlm.training.inputs import ModelInputs, move
from cvlm.training.module import PhaseModule, towers_set_aside
from cvlm.training.target import TargetSource
from cvlm.training.trainer import (
    COMPLETE,
    IndexDataset,
    PhaseTrainer,
    ResumeMarks,
    StepProgress,
    last_complete_checkpoint,
)
from distill import Objective, Request

logger = logging.getLogger(__name__)

Report = Callable[[int, int, float | None], None]
CHECKPOINTS_PER_PHASE = 8
LOGS_PER_PHASE = 50


@dataclass(frozen=True, kw_only=True)
class PhaseJob:
    """Everything that one phase needs.

    Attributes:
        student: trained in place.
        phase: objectives aside, how to train.
        objectives: the terms of the loss; adapters are made on the way.
        inputs: how to feed the student.
        target: where the teacher's signal comes from; None without a teacher.
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
    engine: EngineSpec = field(default_factory=EngineSpec)
    seed: int = 0
    folder: Path
    report: Report | None = None

    @property
    def index(self) -> np.ndarray[Any, Any]:
        """The pairs that this phase trains on."""
        examples = self.inputs.examples
        return np.arange(len(examples)) if self.phase.pairs == "all" else examples.labelled


def train_phase(job: PhaseJob) -> tuple[PhaseCost, list[dict[str, float]]]:
    """Train `job.student` in place.

    Returns:
        What it cost, interrupted attempts up to their last checkpoint included; and the log, one record per logging
        step with `loss`, `term/NAME` and `step`.

    Raises:
        CvlmError: there is nothing to train on, or the DeepSpeed file is missing.
    """
    if len(job.index) < 2:
        raise CvlmError(
            f"a phase with pairs: {job.phase.pairs} has {len(job.index)} pair(s) to train on; it needs at least 2"
        )
    request, teacher_request = requests(job)
    with towers_set_aside(job.student, job.inputs.stored):
        torch.manual_seed(job.seed)
        module = PhaseModule(job.student, job.objectives, request)
        arguments = _arguments(job)
        module.to(arguments.device)
        flops = _prepare_and_count(job, module, teacher_request, arguments)
        return _fit(job, module, teacher_request, arguments, flops)


def pick_device(engine: EngineSpec) -> str:
    """Return where models run: a GPU if there is one and the engine leaves the choice."""
    return "cuda" if torch.cuda.is_available() and engine.device == "auto" else "cpu"


def requests(job: PhaseJob) -> tuple[Request, Request]:
    """Return what the student's and the teacher's forward passes must record for the job's objectives."""
    teacher_depth = job.target.depth if job.target is not None else 0
    return merged_requests(job.objectives, job.student.fusion.depth, teacher_depth)


def merged_requests(objectives: Sequence[Objective], student_depth: int, teacher_depth: int) -> tuple[Request, Request]:
    """Return the union of what objectives ask of a student and of a teacher with these numbers of layers."""
    student, teacher = Request(fields=frozenset()), Request(fields=frozenset())
    for objective in objectives:
        ours, theirs = objective.requests(student_depth, teacher_depth)
        student, teacher = student | ours, teacher | theirs
    return student, teacher


def collate(job: PhaseJob, positions: Sequence[int], teacher_request: Request) -> dict[str, Any]:
    """Turn pair indices into one batch of CPU tensors."""
    index = np.asarray(positions, dtype=np.int64)
    batch = job.inputs.pairs(index)
    batch["labels"] = torch.from_numpy(job.inputs.examples.labels[index])
    batch["examples"] = len(index)
    batch["teacher"] = job.target.fetch(index, teacher_request) if job.target is not None else None
    return batch


def _fit(
    job: PhaseJob, module: PhaseModule, teacher_request: Request, arguments: TrainingArguments, flops: float
) -> tuple[PhaseCost, list[dict[str, float]]]:
    checkpoint = last_complete_checkpoint(job.folder)
    earlier = None
    if checkpoint is not None:
        logger.info("resuming from %s", checkpoint)
        mark = json.loads((checkpoint / COMPLETE).read_text(encoding="utf-8"))
        if mark["identity"] != _identity(job):
            raise CvlmError(
                f"{job.folder} holds the checkpoints of another phase (other student, data, objectives or settings); "
                "choose another folder, or delete it"
            )
        earlier = PhaseCost.from_json(mark["cost"])
    rank = int(os.environ.get("LOCAL_RANK", "0"))
    with PhaseMeter(device=str(arguments.device), local_rank=rank, resume_from=earlier) as meter:
        samples = arguments.train_batch_size * arguments.gradient_accumulation_steps

        def report(step: int, steps: int, loss: float | None) -> None:
            meter.add(flops=round(flops * samples), samples=samples)
            if job.report is not None and rank == 0:
                job.report(step, steps, loss)

        target = job.target
        trainer = PhaseTrainer(
            module,
            arguments,
            dataset=IndexDataset(job.index),
            collate=lambda positions: collate(job, positions, teacher_request),
            teacher_signal=None if target is None else lambda batch: target.signal(batch, teacher_request),
            callbacks=[
                StepProgress(report),
                ResumeMarks(_identity(job), lambda: meter.cost.to_json()),
                TensorBoardCallback(SummaryWriter(str(job.folder / "tensorboard"))),
            ],
        )
        trainer.remove_callback(PrinterCallback)
        trainer.remove_callback(ProgressCallback)
        spare = copy.deepcopy(job.student) if _partitions_weights(trainer) else None
        trainer.train(resume_from_checkpoint=str(checkpoint) if checkpoint is not None else None)
    if spare is not None:
        _restore_weights(job.student, spare, trainer)
    module.eval()
    log = [record for record in trainer.state.log_history if "loss" in record]
    return merge_ranks(gather_object([meter.cost])), log


def _identity(job: PhaseJob) -> str:
    """Fingerprint of everything that a phase's trajectory depends on, apart from the starting weights."""
    terms = [(term.kind, sorted(_plain(vars(term)).items())) for term in job.objectives]
    settings = (job.student.spec, job.student.task, job.phase, job.engine.precision, job.seed, terms)
    return sha256(f"{settings}|{job.inputs.examples.fingerprint}|{job.index.tobytes()!r}".encode()).hexdigest()


def _plain(attributes: dict[str, Any]) -> dict[str, Any]:
    return {k: v for k, v in attributes.items() if isinstance(v, str | float | list | tuple) or type(v) is int}


def _partitions_weights(trainer: PhaseTrainer) -> bool:
    """Whether this is DeepSpeed ZeRO-3, under which no process holds the whole model."""
    plugin = trainer.accelerator.state.deepspeed_plugin
    return plugin is not None and plugin.zero_stage == 3


def _restore_weights(student: CVLM, spare: CVLM, trainer: PhaseTrainer) -> None:
    """Give the student whole modules again, filled on the first process with the weights gathered from all."""
    state = trainer.accelerator.get_state_dict(trainer.deepspeed)
    if state:
        own = {name.removeprefix("student."): value for name, value in state.items() if name.startswith("student.")}
        spare.load_state_dict(own, strict=True)
    for name, module in spare.named_children():
        setattr(student, name, module)


def clear_checkpoints(folder: Path) -> None:
    """Delete a finished phase's checkpoints; call it once the model is saved."""
    for path in folder.glob("checkpoint-*"):
        shutil.rmtree(path)


def _prepare_and_count(
    job: PhaseJob, module: PhaseModule, teacher_request: Request, arguments: TrainingArguments
) -> float:
    """Make the objectives' adapters from one batch, and count the FLOPs of a training step per sample.

    Random state and gradients are left as they were.
    """
    size = min(arguments.train_batch_size, len(job.index))
    rows = np.random.default_rng(0).permutation(len(job.index))[:size]
    batch = collate(job, list(job.index[rows]), teacher_request)
    inputs = {name: move(batch[name], arguments.device) for name in ("image", "text", "labels")}
    teacher = None
    if job.target is not None:
        teacher = job.target.signal(batch["teacher"], teacher_request).to(arguments.device)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(job.seed)
        with torch.no_grad():
            signal = job.student(inputs["image"], inputs["text"], request=module.request, labels=inputs["labels"])
            for objective in job.objectives:
                objective.prepare(signal, teacher)
        module.train()
        divisors = module.counts(inputs["labels"], size)
        flops = count_flops(
            lambda: module(inputs["image"], inputs["text"], inputs["labels"], teacher, divisors)["loss"].backward()
        )
    module.zero_grad(set_to_none=True)
    return (flops + (job.target.flops(batch["teacher"], teacher_request) if job.target is not None else 0)) / size


def _arguments(job: PhaseJob) -> TrainingArguments:
    """Translate the phase and the engine into the settings of the Hugging Face `Trainer`."""
    phase, engine = job.phase, job.engine
    if engine.deepspeed is not None and not engine.deepspeed.is_file():
        raise CvlmError(f"engine.deepspeed names {engine.deepspeed}, which is no file")
    world = int(os.environ.get("WORLD_SIZE", "1"))
    cpu = pick_device(engine) == "cpu"
    per_step = phase.batch_size * phase.accumulate
    if phase.batch_size % world:
        raise CvlmError(f"batch_size {phase.batch_size} cannot be split evenly over {world} processes")
    batch = min(phase.batch_size, len(job.index) // phase.accumulate or 1)
    steps = max(1, math.ceil(phase.epochs * len(job.index) / min(per_step, len(job.index))))
    arguments = TrainingArguments(
        output_dir=str(job.folder),
        max_steps=steps,
        per_device_train_batch_size=max(1, batch // world),
        gradient_accumulation_steps=phase.accumulate,
        learning_rate=phase.learning_rate,
        weight_decay=phase.weight_decay,
        warmup_steps=round(phase.warmup * steps),
        lr_scheduler_type=phase.schedule,
        max_grad_norm=phase.clip,
        seed=job.seed,
        data_seed=job.seed,
        use_cpu=cpu,
        bf16=engine.precision == "bf16",
        fp16=engine.precision == "fp16",
        deepspeed=str(engine.deepspeed) if engine.deepspeed is not None else None,
        logging_steps=max(1, steps // LOGS_PER_PHASE),
        save_steps=max(1, steps // CHECKPOINTS_PER_PHASE),
        save_total_limit=2,
        dataloader_drop_last=True,
        remove_unused_columns=False,
        label_names=[],
        report_to=[],
        disable_tqdm=True,
        log_level="error",
    )
    # One process drives one GPU; several run under torchrun. The Trainer would split batches over all it sees.
    arguments._n_gpu = min(arguments.n_gpu, 1)
    return arguments
