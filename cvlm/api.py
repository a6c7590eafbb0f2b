"""The Python API: compose a model, get a teacher, distil."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from pydantic import TypeAdapter, ValidationError
from torch import nn

from cvlm.config import DataSpec, EngineSpec, FusionSpec, ObjectiveSpec, PhaseSpec, StudentSpec, TextSpec, VisionSpec
from cvlm.cost import PhaseCost
from cvlm.data import Examples, Splits, load_data
from cvlm.data.from_stream import is_pattern, load_pattern
from cvlm.data.streaming import Stream
from cvlm.errors import CvlmError
from cvlm.model import CVLM, compose
from cvlm.tasks import TASKS
from cvlm.training import (
    CvlmTeacher,
    EmaTeacher,
    LiveTarget,
    ModelInputs,
    PeersTarget,
    PeerTeacher,
    PhaseJob,
    TargetSource,
    clear_checkpoints,
    load_cvlm_teacher,
    model_inputs,
    pick_device,
    teacher_inputs,
    train_phase,
)
from cvlm.training.lineage import record_of_training
from distill import DistillError, Objective, Teacher, build_objective, check_requirements
from distill import load_teacher as load_other_teacher

EncoderLike = str | Mapping[str, Any] | nn.Module


def build(
    *,
    vision: EncoderLike | None,
    text: EncoderLike,
    task: str,
    fusion: str | Mapping[str, Any] = "co_attention",
    answers: Sequence[str] = (),
    embedding: int = 128,
) -> CVLM:
    """Compose an untrained CVLM.

    Args:
        vision: an encoder name such as `timm:vit_base_patch16_224`; a mapping with the keys of `VisionSpec`; or an
            instance of your own class that keeps the `cvlm.Encoder` protocol (trained in full unless its parameters
            do not require gradients). None for task `text`.
        text: likewise, with the keys of `TextSpec`.
        task: a key of `cvlm.TASKS`.
        fusion: a fusion kind, or a mapping with the keys of `FusionSpec`.
        answers: the answer vocabulary, for `vqa`.
        embedding: width of the shared space, for `retrieval`.

    Raises:
        CvlmError: a name or a setting is wrong.
    """
    try:
        spec = StudentSpec(
            vision=None if vision is None else _encoder_spec(VisionSpec, vision),
            text=_encoder_spec(TextSpec, text),
            fusion=FusionSpec(**({"kind": fusion} if isinstance(fusion, str) else fusion)),
            embedding=embedding,
        )
    except ValidationError as error:
        raise CvlmError(f"cvlm.build: {_problems(error)}") from error
    return compose(
        spec,
        task=task,
        answers=tuple(answers),
        vision=vision if isinstance(vision, nn.Module) else None,
        text=text if isinstance(text, nn.Module) else None,
    )


def load_teacher(
    name: str | Path | CVLM | Teacher | None = None,
    *,
    kind: str | None = None,
    task: str | None = None,
    **settings: Any,
) -> Teacher:
    """Load a teacher.

    Args:
        name: a folder of a trained CVLM or of a transformers model; `hf:` and a hub name, such as
            `hf:facebook/flava-full`; a trained CVLM; or an object that keeps the `distill.Teacher` protocol. Left out
            for kinds that have none, such as `kind="callable", target=function, answers=[...]`.
        kind: a key of `distill.TEACHERS`, where the model's own configuration shall not decide.
        task: checked against a CVLM's own.
        **settings: settings of that kind.

    Raises:
        CvlmError: there is no such model, or it was trained for another task.
        DistillError: the model cannot be a teacher of that kind.
    """
    if isinstance(name, CVLM):
        teacher: Teacher = load_cvlm_teacher(name)
    elif kind is not None:
        teacher = load_other_teacher(kind, **({} if name is None else {"name": name}), **settings)
    elif name is None:
        raise CvlmError("load_teacher needs a name, or the kind of a teacher that has none, such as kind='callable'")
    elif isinstance(name, str | Path) and not str(name).startswith("hf:") and not Path(name).is_dir():
        teacher = load_cvlm_teacher(name)  # a hub name; the loader's message says what else it could have been
    else:
        teacher = load_other_teacher(name, **settings)
    if task is not None and isinstance(teacher, CvlmTeacher) and teacher.model.task != task:
        raise CvlmError(f"the teacher {teacher.name} was trained for task {teacher.model.task!r}, not {task!r}")
    return teacher


@dataclass(frozen=True, kw_only=True)
class DistillResult:
    """What a call of `distill` gives back.

    Attributes:
        model: the student that was passed in, trained.
        cost: what it cost.
        log: one record per logging step: `step`, `loss`, `term/NAME`.
    """

    model: CVLM
    cost: PhaseCost
    log: list[dict[str, float]]


def distill(
    model: CVLM,
    teacher: Teacher | CVLM | None,
    *,
    data: Examples | str | Path | dict[str, Any],
    objectives: Sequence[str | Mapping[str, Any] | Objective] = ("labels", "logits", "cross_attention"),
    out: str | Path | None = None,
    features: str | Path | None = None,
    seed: int = 0,
    engine: EngineSpec | None = None,
    report: Callable[[int, int, float | None], None] | None = None,
    **phase: Any,
) -> DistillResult:
    """Train a student with a teacher's targets, or without a teacher on labels alone.

    Args:
        model: the student; trained in place.
        teacher: the teacher, live in every step; None for objectives that need none.
        data: the training pairs, or what `load_split` takes, for its training split, or tar shards to stream, such as
            `https://.../train-{000..063}.tar`; pairs whose label is hidden are used by teacher-based objectives alone.
        objectives: names, mappings with `kind`, or instances.
        out: folder for checkpoints and TensorBoard events; a call that was interrupted resumes from it. None keeps
            nothing.
        features: folder for the stored outputs of frozen towers; None keeps them for this call alone.
        seed: of data order, dropout and adapters.
        engine: precision, DeepSpeed, device.
        report: called with (step, steps, loss).
        **phase: keys of `PhaseSpec`, such as `epochs`, `batch_size`, `learning_rate`. `pairs` is `all` by default.

    Afterwards `model.training_record` says what the model was trained on, its start and its teacher included, and
    `save_pretrained` writes it. For that every training picture is decoded once before the first step, unless an
    earlier record knows the split.

    Raises:
        DistillError: an objective needs what a side cannot give; raised before the first step.
    """
    terms = [_objective(objective) for objective in objectives]
    if teacher is model or getattr(teacher, "model", None) is model:
        raise CvlmError("the student cannot be its own teacher: teaching freezes a model; pass a copy of it")
    if isinstance(teacher, PeerTeacher) and any(student is model for student in teacher.students):
        raise CvlmError("the student cannot be its own peer; compose another one, with weights of another seed")
    engine = engine or EngineSpec()
    device = pick_device(engine)
    source: Teacher | None = CvlmTeacher(teacher) if isinstance(teacher, CVLM) else teacher
    if isinstance(source, EmaTeacher):
        source.follow(model)
    check_teacher(model, source, terms)
    stream = None
    if not isinstance(data, Examples):
        data, stream = _training_data(data, task=model.task, answers=model.answers)
    specs = tuple(ObjectiveSpec(kind=term.kind) for term in terms)
    try:
        spec = PhaseSpec(**{"pairs": "all", **phase}, objectives=specs)
    except ValidationError as error:
        raise CvlmError(f"cvlm.distill: {_problems(error)}") from error
    read = source if any(term.teacher_needs for term in terms) else None
    record = record_of_training(model, read, data, phase="cvlm.distill", streamed=stream is not None)
    with TemporaryDirectory() as scratch:
        store = Path(features) if features is not None else Path(scratch) / "features"
        inputs = model_inputs(model, data, store if stream is None else None, device=device)
        target = None if source is None else _target(source, inputs, None if stream is not None else store, device)
        job = PhaseJob(
            student=model,
            phase=spec,
            objectives=terms,
            inputs=inputs,
            target=target,
            stream=stream,
            engine=engine,
            seed=seed,
            folder=Path(out) if out is not None else Path(scratch) / "phase",
            report=report,
        )
        cost, log = train_phase(job)
        clear_checkpoints(job.folder)
    model.training_record = record
    return DistillResult(model=model, cost=cost, log=log)


def _target(teacher: Teacher, inputs: ModelInputs, store: Path | None, device: str) -> TargetSource:
    """Return where a phase gets its teacher's signal from; without a store, which streams have none of, all live."""
    data = inputs.examples
    if isinstance(teacher, PeerTeacher):
        if store is None:
            raise CvlmError("peers need data whose pairs are known beforehand; import the shards: cvlm data import")
        fed = tuple(model_inputs(student, data, store, device=device) for student in teacher.students)
        return PeersTarget(students=teacher.students, inputs=fed)
    if isinstance(teacher, EmaTeacher):
        return LiveTarget(teacher=teacher, examples=data, inputs=None if store is None else inputs, device=device)
    stored = None if store is None else teacher_inputs(teacher, data, store, device=device)
    return LiveTarget(teacher=teacher.to(device), examples=data, inputs=stored, device=device)


def load_split(data: str | Path | dict[str, Any], split: str, *, task: str, answers: tuple[str, ...] = ()) -> Examples:
    """Load the split of a data set that fits a model.

    Args:
        data: the name of a data kind such as `easy_vqa`; a folder with `train.jsonl` and `test.jsonl`, or one
            that `cvlm data import` wrote; shards of an import such as `shards/val-{000000..000031}.tar`, whatever
            `split` says; or a mapping with the keys of a data specification.
        split: `train` or `test`.
        task: a key of `cvlm.TASKS`.
        answers: the model's answer vocabulary, where the data does not fix one.

    Raises:
        CvlmError: the data or the split does not exist, or does not fit the task.
    """
    if split not in ("train", "test"):
        raise CvlmError(f"split is {split!r}; use train or test")
    if is_pattern(data):
        found = load_pattern(str(data), task, answers)
        if not isinstance(found, Examples):
            raise CvlmError(f"{data} can only be streamed, for training; to score on it, import it: cvlm data import")
        return found
    splits = _load_splits(data, task, answers)
    if split == "train" and splits.stream is not None:
        raise CvlmError("a stream can be trained on, not scored on; take split: test")
    return splits.train if split == "train" else splits.test


def _training_data(
    data: str | Path | dict[str, Any], task: str, answers: tuple[str, ...]
) -> tuple[Examples, Stream | None]:
    """Return the training pairs; of a stream its first ones, and the stream."""
    if is_pattern(data):
        found = load_pattern(str(data), task, answers)
        return (found, None) if isinstance(found, Examples) else (found.preview(), found)
    splits = _load_splits(data, task, answers)
    return splits.train, splits.stream


def _load_splits(data: str | Path | dict[str, Any], task: str, answers: tuple[str, ...]) -> Splits:
    if isinstance(data, dict):
        raw = data
    elif Path(data).is_dir():
        kind = "shards" if (Path(data) / "index.json").is_file() else "jsonl"
        raw = {"kind": kind, "path": str(data), "answers": None if TASKS[task].answers else answers or None}
    else:
        raw = {"kind": str(data)}
    try:
        spec = TypeAdapter(DataSpec).validate_python(raw)
    except ValidationError as error:
        raise CvlmError(
            f"data {data!r} is neither a folder with train.jsonl and test.jsonl nor imported shards nor a data kind: "
            + "; ".join(": ".join([*map(str, item["loc"][1:]), item["msg"]]) for item in error.errors())
        ) from error
    return load_data(spec, task)


def check_teacher(model: CVLM, teacher: Teacher | None, objectives: Sequence[Objective]) -> None:
    """Refuse, before the first step, a teacher that cannot serve a student's objectives.

    Raises:
        DistillError: the teacher takes another number of pictures, a field is missing on one side, or the two answer
            over different vocabularies.
    """
    shown = model.facts.pictures
    taken = getattr(teacher, "pictures", 1)
    if teacher is not None and taken != shown:
        raise DistillError(
            f"each example of {model.task!r} shows {shown} picture(s), and the teacher {teacher.name} takes {taken}; "
            f"teach with a CVLM of task {model.task!r}"
        )
    fields = teacher.fields if teacher is not None else frozenset()
    check_requirements(objectives, model.fields, fields, teacher.name if teacher is not None else "(none)")
    answers = getattr(teacher, "answers", None)
    if teacher is None:
        return
    # A captioner's vocabulary also numbers the words that its teacher reads.
    if model.facts.output == "words" and answers is not None and tuple(answers) != model.answers:
        raise DistillError(
            f"the teacher {teacher.name} answers over {len(answers)} answers and the student over "
            f"{len(model.answers)}, or in another order; give both the same vocabulary"
        )
    for objective in objectives:
        objective.match(model.answers, answers)


def _objective(value: str | Mapping[str, Any] | Objective) -> Objective:
    if not isinstance(value, Mapping):
        return build_objective(value)
    if "kind" not in value:
        raise CvlmError(
            f"the objective {dict(value)} has no 'kind'; for instance {{'kind': 'logits', 'temperature': 2.0}}"
        )
    return build_objective(**value)


def _encoder_spec(spec: type[VisionSpec] | type[TextSpec], encoder: EncoderLike) -> Any:
    if isinstance(encoder, nn.Module):
        frozen = not any(parameter.requires_grad for parameter in encoder.parameters())
        return spec(name="custom", train="frozen" if frozen else "full")
    return spec(name=encoder) if isinstance(encoder, str) else spec(**encoder)


def _problems(error: ValidationError) -> str:
    return "; ".join(f"{'.'.join(map(str, item['loc']))}: {item['msg']}" for item in error.errors())
