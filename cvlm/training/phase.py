"""One phase: train a student on a split with a list of objectives, resuming where an earlier attempt was stopped."""

import copy
import json
import logging
import math
import os
import shutil
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
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

from cvlm.config import EngineSpec
from cvlm.cost import PhaseCost, PhaseMeter, count_flops, merge_ranks
from cvlm.data.order import share_of
from cvlm.errors import CvlmError
from cvlm.model import CVLM
from cvlm.training.ema import EmaTeacher, EmaUpdates
from cvlm.training.inputs import move
from cvlm.training.job import PhaseJob, collate, collate_stream, micro_batch, order_of
from cvlm.training.module import PhaseModule, towers_set_aside
from cvlm.training.peers import PeerModule, PeersTarget
from cvlm.training.target import LiveTarget
from cvlm.training.trainer import (
    COMPLETE,
    PhaseTrainer,
    ResumeMarks,
    StepProgress,
    last_complete_checkpoint,
)
from cvlm.training.weights import StepPlan
from distill import Objective, Request
from distill.schedule import WeightSchedule

logger = logging.getLogger(__name__)

CHECKPOINTS_PER_PHASE = 8
LOGS_PER_PHASE = 50


def train_phase(job: PhaseJob) -> tuple[PhaseCost, list[dict[str, float]]]:
    """Train `job.student` in place.

    Returns:
        What it cost, interrupted attempts up to their last checkpoint included; and the log, one record per logging
        step with `step`, `loss`, each term's value `term/NAME` and weight `weight/NAME`, and, if asked for, its share
        of the gradients' norms `gradient/NAME`.

    Raises:
        CvlmError: there is nothing to train on, the captions do not fit, every weight is 0 in some step, gradients
            cannot be measured, or the DeepSpeed file is missing.
    """
    _check_captions(job)
    _check_gradients(job)
    if min(len(job.index), job.size) < 2:
        raise CvlmError(
            f"a phase with pairs: {job.phase.pairs} has {len(job.index)} pair(s) to train on; it needs at least 2"
        )
    with _stored_towers_aside(job):
        average = _average(job)
        if average is not None:
            average.follow(job.student)
        if job.target is not None:
            for objective in job.objectives:
                objective.match(job.student.answers, job.target.answers)
        request, teacher_request = requests(job)
        torch.manual_seed(job.seed)
        module = _module(job, request, teacher_request)
        arguments = _arguments(job)
        module.to(arguments.device)
        if average is not None:
            average.to(arguments.device)
        plan = StepPlan.of(job.phase, arguments.max_steps, round(arguments.logging_steps))
        flops = _prepare_and_count(job, module, teacher_request, arguments, plan)
        return _fit(job, module, teacher_request, arguments, plan, flops)


@contextmanager
def _stored_towers_aside(job: PhaseJob) -> Iterator[None]:
    with ExitStack() as aside:
        aside.enter_context(towers_set_aside(job.student, job.inputs.stored))
        if isinstance(job.target, PeersTarget):
            for student, inputs in zip(job.target.students, job.target.inputs, strict=True):
                aside.enter_context(towers_set_aside(student, inputs.stored))
        yield


def _module(job: PhaseJob, request: Request, teacher_request: Request) -> PhaseModule:
    if isinstance(job.target, PeersTarget):
        return PeerModule(job.student, job.objectives, request | teacher_request, job.target.students)
    return PhaseModule(job.student, job.objectives, request, balance=job.phase.balance is not None)


def _average(job: PhaseJob) -> EmaTeacher | None:
    """Return the teacher of a phase that the student's own moving average teaches."""
    teacher = job.target.teacher if isinstance(job.target, LiveTarget) else None
    return teacher if isinstance(teacher, EmaTeacher) else None


def _check_captions(job: PhaseJob) -> None:
    """Refuse captions that were numbered for another vocabulary, or that are hidden and would be read all the same."""
    if job.student.facts.output != "words":
        return
    examples = job.inputs.examples
    if examples.answers != job.student.answers:
        raise CvlmError(
            f"the student says {len(job.student.answers)} words and {examples.name} was read with a vocabulary of "
            f"{len(examples.answers)}, or in another order; both need the same"
        )
    hidden = len(job.index) - len(np.intersect1d(job.index, examples.labelled))
    if hidden:
        raise CvlmError(
            f"pairs: {job.phase.pairs} trains on {hidden} pairs whose caption is hidden, and a captioner reads the "
            "caption of every pair; use pairs: labelled"
        )


def _check_gradients(job: PhaseJob) -> None:
    """Refuse to measure gradients where no process holds them as they are."""
    if job.engine.deepspeed is not None and (job.phase.log_gradients or job.phase.balance):
        raise CvlmError("log_gradients and balance read gradients, which DeepSpeed keeps for itself; leave one out")
    if isinstance(job.target, PeersTarget) and job.phase.balance:
        raise CvlmError("balance follows one student's gradients, and peers train several; leave one out")


def pick_device(engine: EngineSpec) -> str:
    """Return where models run: a GPU if there is one and the engine leaves the choice."""
    return "cuda" if torch.cuda.is_available() and engine.device == "auto" else "cpu"


def requests(job: PhaseJob) -> tuple[Request, Request]:
    """Return what the student's and the teacher's forward passes must record for the job's objectives."""
    teacher_depth = job.target.depth if job.target is not None else 0
    return merged_requests(job.objectives, job.student.depth, teacher_depth)


def merged_requests(objectives: Sequence[Objective], student_depth: int, teacher_depth: int) -> tuple[Request, Request]:
    """Return the union of what objectives ask of a student and of a teacher with these numbers of layers."""
    student, teacher = Request(fields=frozenset()), Request(fields=frozenset())
    for objective in objectives:
        ours, theirs = objective.requests(student_depth, teacher_depth)
        student, teacher = student | ours, teacher | theirs
    return student, teacher


def _fit(
    job: PhaseJob,
    module: PhaseModule,
    teacher_request: Request,
    arguments: TrainingArguments,
    plan: StepPlan,
    flops: Callable[[int], float],
) -> tuple[PhaseCost, list[dict[str, float]]]:
    checkpoint = last_complete_checkpoint(job.folder)
    mark = _read_mark(job, checkpoint, arguments) if checkpoint is not None else None
    done = int(str(checkpoint).rpartition("-")[2]) if checkpoint is not None else 0
    # The earlier cost is of all processes together; one of them carries it on.
    earlier = PhaseCost.from_json(mark["cost"]) if mark is not None and arguments.process_index == 0 else None
    order = order_of(job, arguments, done)
    with PhaseMeter(
        device=str(arguments.device), local_rank=arguments.local_process_index, resume_from=earlier
    ) as meter:
        samples = len(share_of(order.batch, order.rank, order.world)) * arguments.gradient_accumulation_steps

        def report(step: int, steps: int, loss: float | None) -> None:
            meter.add(flops=round(flops(step - 1) * samples), samples=samples)
            if job.report is not None and arguments.process_index == 0:
                job.report(step, steps, loss)

        target, average = job.target, _average(job)
        trainer = PhaseTrainer(
            module,
            arguments,
            plan=plan,
            source=order,
            epochs=job.phase.epochs,
            collate=lambda part: (collate if job.stream is None else collate_stream)(job, part, teacher_request),
            teacher_signal=None if target is None else lambda batch: target.signal(batch, teacher_request),
            callbacks=[
                StepProgress(report),
                *([] if average is None else [EmaUpdates(average, checkpoint)]),
                ResumeMarks(_identity(job), lambda: merge_ranks(gather_object([meter.cost])).to_json()),
                TensorBoardCallback(SummaryWriter(str(job.folder / "tensorboard"))),
            ],
        )
        trainer.remove_callback(PrinterCallback)
        trainer.remove_callback(ProgressCallback)
        spare = copy.deepcopy(job.student) if _partitions_weights(trainer) else None
        if spare is not None and average is not None:
            raise CvlmError(
                "a moving average needs the student's whole weights in every process, and ZeRO stage 3 splits them; "
                "take configs/deepspeed/zero2.json, or another teacher than kind: ema"
            )
        trainer.train(resume_from_checkpoint=str(checkpoint) if checkpoint is not None else None)
    if spare is not None:
        _restore_weights(job.student, spare, trainer)
    module.eval()
    log = [record for record in trainer.state.log_history if "loss" in record]
    return merge_ranks(gather_object([meter.cost])), log


def _read_mark(job: PhaseJob, checkpoint: Path, arguments: TrainingArguments) -> dict[str, Any]:
    """Return what stands in a checkpoint about itself, if this phase can go on from it."""
    logger.info("resuming from %s", checkpoint)
    mark: dict[str, Any] = json.loads((checkpoint / COMPLETE).read_text(encoding="utf-8"))
    if mark["identity"] != _identity(job):
        raise CvlmError(
            f"{job.folder} holds the checkpoints of another phase (other student, data, objectives or settings); "
            "choose another folder, or delete it"
        )
    if arguments.deepspeed is not None and mark["processes"] != arguments.world_size:
        raise CvlmError(
            f"{checkpoint} was written by {mark['processes']} process(es) under DeepSpeed, which splits the optimiser "
            f"among them; it cannot go on with {arguments.world_size}. Start as many as before, or delete the folder"
        )
    return mark


def _identity(job: PhaseJob) -> str:
    """Fingerprint of everything that a phase's trajectory depends on, apart from the starting weights."""
    terms = [(term.kind, sorted(_plain(vars(term)).items())) for term in job.objectives]
    settings: tuple[object, ...] = (
        job.student.spec,
        job.student.task,
        job.phase,
        job.engine.precision,
        job.seed,
        terms,
        job.stream,
    )
    if isinstance(job.target, PeersTarget):
        settings = (*settings, [student.spec for student in job.target.students])
    if (average := _average(job)) is not None:
        settings = (*settings, average.decay)
    return sha256(f"{settings}|{job.inputs.examples.fingerprint}|{job.index.tobytes()!r}".encode()).hexdigest()


def _plain(attributes: dict[str, Any]) -> dict[str, Any]:
    kinds = (str, float, list, tuple, WeightSchedule)
    return {k: v for k, v in attributes.items() if isinstance(v, kinds) or type(v) is int}


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
    job: PhaseJob, module: PhaseModule, teacher_request: Request, arguments: TrainingArguments, plan: StepPlan
) -> Callable[[int], float]:
    """Make the objectives' adapters from one batch, and count the FLOPs of training steps per sample.

    Random state and gradients are left as they were.

    Returns:
        A function of the step's number: terms are left out where their weight is 0, and gradients measured in some.
    """
    size = min(arguments.train_batch_size, len(job.index))
    rows = np.random.default_rng(0).permutation(len(job.index))[:size]
    batch = collate(job, list(job.index[rows]), teacher_request)
    image, text, labels = (move(batch[name], arguments.device) for name in ("image", "text", "labels"))
    teacher, teacher_flops = None, 0
    if job.target is not None:
        teacher = job.target.signal(batch["teacher"], teacher_request).to(arguments.device)
        teacher_flops = job.target.flops(batch["teacher"], teacher_request)
    divisors = module.counts(labels, size)
    found: dict[tuple[tuple[bool, ...], bool], float] = {}
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(job.seed)
        with torch.no_grad():
            module.prepare(image, text, labels, teacher)
        module.train()
        for step in range(plan.steps):
            for measure in {False, plan.measures(step)}:
                kind = (plan.active(job.objectives, step), measure)
                if kind not in found:
                    module.begin(plan.progress(step), measure=measure)
                    flops = count_flops(lambda: module(image, text, labels, teacher, divisors)["loss"].backward())
                    found[kind] = (flops + (teacher_flops if module.reads_teacher else 0)) / size
    module.zero_grad(set_to_none=True)

    def per_sample(step: int) -> float:
        active = plan.active(job.objectives, step)
        plain = found[active, False]
        # Only the last micro-batch of a step is measured.
        return plain + (found[active, plan.measures(step)] - plain) / job.phase.accumulate

    return per_sample


def _arguments(job: PhaseJob) -> TrainingArguments:
    """Translate the phase and the engine into the settings of the Hugging Face `Trainer`."""
    phase, engine = job.phase, job.engine
    if engine.deepspeed is not None and not engine.deepspeed.is_file():
        raise CvlmError(f"engine.deepspeed names {engine.deepspeed}, which is no file")
    world = int(os.environ.get("WORLD_SIZE", "1"))
    cpu = pick_device(engine) == "cpu"
    batch = micro_batch(job)
    if batch < world:
        raise CvlmError(
            f"a batch of {batch} cannot be shared out to {world} processes; raise batch_size, or start fewer"
        )
    steps = max(1, math.ceil(phase.epochs * job.size / (batch * phase.accumulate)))
    logging_steps = max(1, steps // LOGS_PER_PHASE)
    arguments = TrainingArguments(
        output_dir=str(job.folder),
        max_steps=steps,
        per_device_train_batch_size=math.ceil(batch / world),
        gradient_accumulation_steps=phase.accumulate,
        learning_rate=phase.learning_rate,
        weight_decay=phase.weight_decay,
        warmup_steps=round(phase.warmup * steps),
        lr_scheduler_type=phase.schedule,
        max_grad_norm=phase.clip,
        seed=job.seed,
        use_cpu=cpu,
        bf16=engine.precision == "bf16",
        fp16=engine.precision == "fp16",
        deepspeed=str(engine.deepspeed) if engine.deepspeed is not None else None,
        logging_steps=logging_steps,
        # Where a mean over steps is logged too: a resumed phase has forgotten the steps before its checkpoint.
        save_steps=logging_steps * max(1, steps // (CHECKPOINTS_PER_PHASE * logging_steps)),
        save_total_limit=2,
        remove_unused_columns=False,
        label_names=[],
        report_to=[],
        disable_tqdm=True,
        log_level="error",
    )
    # One process drives one GPU; several run under torchrun. The Trainer would split batches over all it sees.
    arguments._n_gpu = min(arguments.n_gpu, 1)
    return arguments
