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
from cvlm.data import Examples, load_data
from cvlm.errors import CvlmError
from cvlm.model import CVLM, compose
from cvlm.training import (
    CvlmTeacher,
    LiveTarget,
    PhaseJob,
    clear_checkpoints,
    load_cvlm_teacher,
    model_inputs,
    pick_device,
    teacher_inputs,
    train_phase,
)
from distill import DistillError, Objective, Teacher, build_objective, check_requirements
from distill import load_teacher as load_other_teacher

EncoderLike = str | Mapping[str, Any] | nn.Module


def build(
    *,
    vision: EncoderLike,
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
            do not require gradients).
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
            vision=_encoder_spec(VisionSpec, vision),
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
    name: str | Path | CVLM | Teacher, *, kind: str | None = None, task: str | None = None, **settings: Any
) -> Teacher:
    """Load a teacher.

    Args:
        name: a folder of a trained CVLM or of a transformers model; `hf:` and a hub name, such as
            `hf:facebook/flava-full`; a trained CVLM; or an object that keeps the `distill.Teacher` protocol.
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
        teacher = load_other_teacher(kind, name=name, **settings)
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
        data: the training pairs, or what `load_split` takes, for its training split; pairs whose label is hidden are
            used by teacher-based objectives alone.
        objectives: names, mappings with `kind`, or instances.
        out: folder for checkpoints and TensorBoard events; a call that was interrupted resumes from it. None keeps
            nothing.
        features: folder for the stored outputs of frozen towers; None keeps them for this call alone.
        seed: of data order, dropout and adapters.
        engine: precision, DeepSpeed, device.
        report: called with (step, steps, loss).
        **phase: keys of `PhaseSpec`, such as `epochs`, `batch_size`, `learning_rate`. `pairs` is `all` by default.

    Raises:
        DistillError: an objective needs what a side cannot give; raised before the first step.
    """
    terms = [_objective(objective) for objective in objectives]
    if teacher is model or getattr(teacher, "model", None) is model:
        raise CvlmError("the student cannot be its own teacher: teaching freezes a model; pass a copy of it")
    engine = engine or EngineSpec()
    device = pick_device(engine)
    source: Teacher | None = CvlmTeacher(teacher) if isinstance(teacher, CVLM) else teacher
    check_teacher(model, source, terms)
    data = data if isinstance(data, Examples) else load_split(data, model, "train")
    specs = tuple(ObjectiveSpec(kind=term.kind, weight=term.weight) for term in terms)
    try:
        spec = PhaseSpec(**{"pairs": "all", **phase}, objectives=specs)
    except ValidationError as error:
        raise CvlmError(f"cvlm.distill: {_problems(error)}") from error
    with TemporaryDirectory() as scratch:
        store = Path(features) if features is not None else Path(scratch) / "features"
        target = None
        if source is not None:
            stored = teacher_inputs(source, data, store, device=device)
            target = LiveTarget(teacher=source.to(device), examples=data, inputs=stored, device=device)
        job = PhaseJob(
            student=model,
            phase=spec,
            objectives=terms,
            inputs=model_inputs(model, data, store, device=device),
            target=target,
            engine=engine,
            seed=seed,
            folder=Path(out) if out is not None else Path(scratch) / "phase",
            report=report,
        )
        cost, log = train_phase(job)
        clear_checkpoints(job.folder)
    return DistillResult(model=model, cost=cost, log=log)


def load_split(data: str | Path | dict[str, Any], model: CVLM, split: str) -> Examples:
    """Load the split of a data set that fits a model.

    Args:
        data: the name of a data kind such as `easy_vqa`; a folder with `train.jsonl` and `test.jsonl`, or one
            that `cvlm data import` wrote; or a mapping with the keys of a data specification.
        model: gives the task, and the answer vocabulary where the data does not fix one.
        split: `train` or `test`.

    Raises:
        CvlmError: the data or the split does not exist, or does not fit the task.
    """
    if split not in ("train", "test"):
        raise CvlmError(f"split is {split!r}; use train or test")
    if isinstance(data, dict):
        raw = data
    elif Path(data).is_dir():
        kind = "shards" if (Path(data) / "index.json").is_file() else "jsonl"
        raw = {"kind": kind, "path": str(data), "answers": model.answers or None}
    else:
        raw = {"kind": str(data)}
    try:
        spec = TypeAdapter(DataSpec).validate_python(raw)
    except ValidationError as error:
        raise CvlmError(
            f"data {data!r} is neither a folder with train.jsonl and test.jsonl nor imported shards nor a data kind: "
            + "; ".join(": ".join([*map(str, item["loc"][1:]), item["msg"]]) for item in error.errors())
        ) from error
    splits = load_data(spec, model.task)
    return splits.train if split == "train" else splits.test


def check_teacher(model: CVLM, teacher: Teacher | None, objectives: Sequence[Objective]) -> None:
    """Refuse, before the first step, a teacher that cannot serve a student's objectives.

    Raises:
        DistillError: a field is missing on one side, or the two answer over different vocabularies.
    """
    fields = teacher.fields if teacher is not None else frozenset()
    check_requirements(objectives, model.fields, fields, teacher.name if teacher is not None else "(none)")
    answers = getattr(teacher, "answers", None)
    wants_logits = any("logits" in objective.teacher_needs for objective in objectives)
    if wants_logits and teacher is not None and answers is not None and tuple(answers) != model.answers:
        raise DistillError(
            f"the teacher {teacher.name} answers over {len(answers)} answers and the student over "
            f"{len(model.answers)}, or in another order; give both the same vocabulary"
        )


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
