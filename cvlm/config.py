"""Recipes and model specifications: strict, immutable, every error of a file reported at once."""

import re
from difflib import get_close_matches
from pathlib import Path
from typing import Annotated, Any, Literal

import yaml
from pydantic import BaseModel, ConfigDict, Field, NonNegativeInt, ValidationError, field_validator, model_validator

from cvlm.errors import CvlmError

Task = Literal["vqa", "retrieval", "nlvr2", "snli_ve", "itm"]
FusionKind = Literal["co_attention", "merged", "cross", "none"]
TRAIN_MODE = re.compile(r"frozen|full|last_[1-9][0-9]*")
RESERVED_PHASES: dict[str, str] = {
    "majority": "the baseline",
    "encode": "the cost of the frozen towers",
    "evaluate": "the cost of scoring",
    "features": "a folder of stored outputs",
    "targets": "a folder of stored targets",
}


class Strict(BaseModel):
    """A specification: unknown keys and infinite numbers are refused, values never change."""

    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False)


class EncoderSpec(Strict):
    """Which encoder, and how much of it is trained.

    Attributes:
        name: `timm:NAME`, `hf:NAME-or-folder`, `open_clip:NAME[/WEIGHTS]`, `package:NAME`, or `custom` for an instance.
        train: `frozen`, `full`, or `last_N` to train the last N layers.
        layer: which layer's tokens to use, counted as in Python lists; None takes the encoder's last.
        pretrained: False builds the architecture with random weights and downloads nothing.
    """

    name: str
    train: str = "frozen"
    layer: int | None = None
    pretrained: bool = True

    @field_validator("train")
    @classmethod
    def _known_mode(cls, value: str) -> str:
        if not TRAIN_MODE.fullmatch(value):
            raise ValueError(f"train is {value!r}; use frozen, full, or last_N such as last_2")
        return value


class VisionSpec(EncoderSpec):
    """A vision encoder.

    Attributes:
        image_size: side of the square input in pixels; None takes the encoder's own.
    """

    image_size: int | None = Field(default=None, ge=8)


class TextSpec(EncoderSpec):
    """A text encoder.

    Attributes:
        max_length: longer texts are cut to this many tokens.
    """

    max_length: int = Field(default=64, ge=4)


class FusionSpec(Strict):
    """The trainable cross-modal module, see `fusion.build_fusion`."""

    kind: FusionKind = "co_attention"
    width: int = Field(default=256, ge=8)
    depth: int = Field(default=2, ge=1)
    heads: int = Field(default=4, ge=1)
    expansion: float = Field(default=4.0, gt=0)
    dropout: float = Field(default=0.1, ge=0, lt=1)

    @model_validator(mode="after")
    def _divisible(self) -> "FusionSpec":
        if self.width % self.heads:
            raise ValueError(f"width {self.width} is not divisible by heads {self.heads}")
        return self


class StudentSpec(Strict):
    """Two encoders and the fusion between them.

    Attributes:
        embedding: width of the shared space that retrieval compares images and texts in.
    """

    vision: VisionSpec
    text: TextSpec
    fusion: FusionSpec = FusionSpec()
    embedding: int = Field(default=128, ge=2)


class CvlmTeacherSpec(StudentSpec):
    """A larger CVLM, trained on the task's labels in the phase `teacher`."""

    kind: Literal["cvlm"]

    @property
    def model(self) -> StudentSpec:
        """What the teacher is composed of."""
        return StudentSpec(vision=self.vision, text=self.text, fusion=self.fusion, embedding=self.embedding)


class SavedTeacherSpec(Strict):
    """A CVLM that was trained before: a folder written by `save_pretrained`."""

    kind: Literal["saved"]
    path: Path


class TransformersTeacherSpec(Strict):
    """A transformers vision-language model by hub name or local folder, already fine-tuned on the task.

    Attributes:
        head: file with a linear answer head over its pooled state (safetensors `weight`, `bias`); only for models
            that ship without one.
    """

    kind: Literal["flava", "vilt"]
    name: str
    head: Path | None = None


TeacherSpec = Annotated[CvlmTeacherSpec | SavedTeacherSpec | TransformersTeacherSpec, Field(discriminator="kind")]


class EasyVqaData(Strict):
    """easy-VQA from its PyPI package, official split; `labelled` is the share of labels the student may see."""

    kind: Literal["easy_vqa"]
    labelled: float = Field(default=1.0, gt=0, le=1)
    limit: int | None = Field(default=None, ge=1)


class OpenMojiData(Strict):
    """OpenMoji pictures with the names of the `emoji` package; split by concept."""

    kind: Literal["openmoji"]
    size: int = Field(default=96, ge=16)
    test: float = Field(default=0.25, gt=0, lt=1)
    labelled: float = Field(default=1.0, gt=0, le=1)
    limit: int | None = Field(default=None, ge=1)


class JsonLinesData(Strict):
    """A folder with `train.jsonl` and `test.jsonl`, lines `{"image": FILE, "text": ..., "answer": ...}`.

    Attributes:
        path: the folder; image files are relative to it.
        answers: the answer vocabulary; None collects it from the training answers.
    """

    kind: Literal["jsonl"]
    path: Path
    answers: tuple[str, ...] | None = None
    labelled: float = Field(default=1.0, gt=0, le=1)
    limit: int | None = Field(default=None, ge=1)


class ShardsData(Strict):
    """A folder that `cvlm data import` wrote.

    Attributes:
        path: the folder.
        evaluate: the split that is scored; None takes the usual one (val of VQA v2, test of Karpathy's).
        answers: the answer vocabulary; None takes the one of the import.
        limit: keep the first pairs of each split.
    """

    kind: Literal["shards"]
    path: Path
    evaluate: str | None = None
    answers: tuple[str, ...] | None = None
    labelled: float = Field(default=1.0, gt=0, le=1)
    limit: int | None = Field(default=None, ge=1)


DataSpec = Annotated[EasyVqaData | OpenMojiData | JsonLinesData | ShardsData, Field(discriminator="kind")]


class ObjectiveSpec(Strict):
    """One term of a loss: `labels`, or `{kind: logits, weight: 1.0, temperature: 2.0}`; see `distill.OBJECTIVES`."""

    model_config = ConfigDict(extra="allow", frozen=True, allow_inf_nan=False)

    kind: str
    weight: float = Field(default=1.0, ge=0)

    @model_validator(mode="before")
    @classmethod
    def _bare_name(cls, value: Any) -> Any:
        return {"kind": value} if isinstance(value, str) else value

    @property
    def settings(self) -> dict[str, Any]:
        """Every key except `kind` and `weight`."""
        return dict(self.model_extra or {})


class PhaseSpec(Strict):
    """How one phase trains. `epochs` counts passes over the phase's pairs.

    Attributes:
        objectives: the terms of the loss.
        pairs: `labelled` trains on the labelled pairs, `all` also on those without a label.
        start: the phase whose weights to begin with; None as `Recipe.start_of` says.
        learning_rate: peak of the schedule, after `warmup` (a share of all steps).
    """

    objectives: tuple[ObjectiveSpec, ...] = Field(min_length=1)
    epochs: float = Field(default=10, gt=0)
    batch_size: int = Field(default=64, ge=2)
    accumulate: int = Field(default=1, ge=1)
    learning_rate: float = Field(default=1e-3, gt=0)
    weight_decay: float = Field(default=0.01, ge=0)
    warmup: float = Field(default=0.05, ge=0, lt=1)
    schedule: Literal["cosine", "linear", "constant"] = "cosine"
    clip: float = Field(default=1.0, gt=0)
    pairs: Literal["labelled", "all"] = "labelled"
    start: str | None = None


class EngineSpec(Strict):
    """How a phase runs on the machine."""

    precision: Literal["fp32", "bf16", "fp16"] = "fp32"
    deepspeed: Path | None = None
    device: Literal["auto", "cpu"] = "auto"


class Recipe(Strict):
    """One experiment: task, data, student, teacher, phases, seeds.

    `phases` holds `teacher` (fine-tune the teacher), `finetune` (phase 1) and any number of further student phases,
    each an arm of the report; those start from `finetune` unless they say otherwise.
    `initialise_fusion: teacher` begins fresh students with the teacher's multimodal weights where shapes match.
    """

    task: Task
    data: DataSpec
    student: StudentSpec
    teacher: TeacherSpec | None = None
    phases: dict[str, PhaseSpec]
    initialise_fusion: Literal["random", "teacher"] = "random"
    seeds: tuple[NonNegativeInt, ...] = Field(default=(0, 1, 2), min_length=1)
    engine: EngineSpec = EngineSpec()

    @property
    def student_arms(self) -> tuple[str, ...]:
        """Phases that train the student, in the order of the file."""
        return tuple(name for name in self.phases if name != "teacher")

    def start_of(self, arm: str) -> str | None:
        """Return the phase that an arm starts from, None for a fresh student."""
        start = self.phases[arm].start
        if start is not None or arm == "finetune":
            return start
        return "finetune" if "finetune" in self.phases else None

    @model_validator(mode="after")
    def _phases_fit(self) -> "Recipe":
        problems = []
        if not self.student_arms:
            problems.append("phases holds no student phase; add finetune")
        seen: list[str] = []
        for name, phase in self.phases.items():
            if not re.fullmatch(r"[a-z][a-z0-9_]*", name):
                problems.append(f"phase name {name!r} must be lower-case letters, digits and _")
            if name in RESERVED_PHASES:
                problems.append(f"{name!r} names {RESERVED_PHASES[name]}; call the phase something else")
            start = phase.start if name == "teacher" else self.start_of(name)
            if start is not None and (name == "teacher" or start not in seen):
                known = ", ".join(seen) if seen and name != "teacher" else "none"
                problems.append(f"phase {name!r} starts from {start!r}, which is no earlier student phase ({known})")
            if name != "teacher":
                seen.append(name)
        if "teacher" in self.phases and not isinstance(self.teacher, CvlmTeacherSpec):
            problems.append("phase 'teacher' trains a teacher of kind cvlm, and the recipe has none")
        if isinstance(self.teacher, CvlmTeacherSpec) and "teacher" not in self.phases:
            problems.append("a teacher of kind cvlm needs a phase 'teacher'; for a trained one use kind: saved")
        if len(set(self.seeds)) != len(self.seeds):
            problems.append(f"seeds {list(self.seeds)} repeat")
        if problems:
            raise ValueError("; ".join(problems))
        return self


def load_recipe(path: Path, overrides: list[str] | None = None) -> Recipe:
    """Read a recipe file and apply `key.sub=value` overrides (values are YAML).

    Raises:
        CvlmError: the file is missing or not YAML, or any key or value is wrong; the text lists every problem.
    """
    try:
        raw = yaml.load(path.read_text(encoding="utf-8"), Loader=_UniqueKeys)
    except OSError as error:
        raise CvlmError(f"cannot read the recipe {path}: {error.strerror}") from error
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise CvlmError(f"{path} is not valid YAML: {error}") from error
    if not isinstance(raw, dict):
        raise CvlmError(f"{path} must hold a mapping with the keys {', '.join(Recipe.model_fields)}")
    for override in overrides or []:
        _apply_override(raw, override)
    return parse_recipe(raw, source=str(path))


class _UniqueKeys(yaml.SafeLoader):
    """Refuses a key that stands twice: YAML would keep the last one and drop the other in silence."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        keys = [key.value for key, _ in node.value if isinstance(key, yaml.ScalarNode)]
        twice = [key for key in dict.fromkeys(keys) if keys.count(key) > 1]
        if twice:
            raise yaml.constructor.ConstructorError(None, None, f"the key {twice[0]!r} stands twice", node.start_mark)
        return super().construct_mapping(node, deep)


def parse_recipe(raw: dict[str, Any], source: str = "recipe") -> Recipe:
    """Validate a recipe given as plain data; `source` names it in messages.

    Raises:
        CvlmError: with one line per problem: place, value, reason, nearest valid name.
    """
    try:
        return Recipe.model_validate(raw)
    except ValidationError as error:
        # A list whose only item is wrong is called too short as well: pydantic counts the valid items.
        items = [item for item in error.errors() if not (item["type"] == "too_short" and item["input"])]
        lines = [_explain(item) for item in items]
        raise CvlmError(f"{source}: {len(lines)} problem(s)\n" + "\n".join(f"  - {line}" for line in lines)) from error


def _apply_override(raw: dict[str, Any], override: str) -> None:
    """Set `a.b.0.c=value` in nested mappings and lists."""
    key, separator, text = override.partition("=")
    if not separator or not key:
        raise CvlmError(f"override {override!r} must read key=value, for instance seeds=[0,1]")
    try:
        value = yaml.safe_load(text)
    except yaml.YAMLError as error:
        raise CvlmError(f"override {override!r}: the value is not valid YAML: {error}") from error
    *parents, last = key.split(".")
    target: Any = raw
    for part in parents:
        step = _step(target, part, override)
        if isinstance(target, dict) and target.get(step) is None:
            target[step] = {}
        target = target[step]
    if not isinstance(target, dict | list):
        raise CvlmError(f"override {override!r}: {'.'.join(parents)!r} holds {target!r}, which has no keys")
    target[_step(target, last, override)] = value


def _step(target: Any, part: str, override: str) -> Any:
    """Return the key or list index that `part` means in `target`."""
    if isinstance(target, list):
        if not part.isdecimal() or int(part) >= len(target):
            raise CvlmError(f"override {override!r}: {part!r} is no index into a list of {len(target)}")
        return int(part)
    if not isinstance(target, dict):
        raise CvlmError(f"override {override!r}: {part!r} is below a value that has no keys")
    return part


def _explain(item: Any) -> str:
    """Turn one pydantic error into `place: reason`, with the nearest known key where one was misspelt."""
    # Behind data and teacher pydantic adds the kind, which is no key of the file.
    tagged = item["loc"][:1] in (("data",), ("teacher",))
    place = ".".join(str(part) for i, part in enumerate(item["loc"]) if not (tagged and i == 1))
    if item["type"] == "extra_forbidden":
        close = get_close_matches(str(item["loc"][-1]), _all_keys(), n=1, cutoff=0.6)
        hint = f"; did you mean {close[0]!r}?" if close else ""
        return f"{place}: unknown key{hint}"
    if item["type"] == "missing":
        return f"{place}: this key is required"
    message = item["msg"].removeprefix("Value error, ")
    value = item.get("input")
    shown = "" if isinstance(value, dict) or item["type"] == "value_error" else f" (got {value!r})"
    return f"{place}: {message}{shown}" if place else f"{message}{shown}"


def _all_keys() -> list[str]:
    """Every key that any specification knows."""
    specs: list[type[BaseModel]] = [Recipe, PhaseSpec, EngineSpec, StudentSpec, VisionSpec, TextSpec, FusionSpec]
    specs += [
        EasyVqaData,
        OpenMojiData,
        JsonLinesData,
        ShardsData,
        CvlmTeacherSpec,
        SavedTeacherSpec,
        TransformersTeacherSpec,
    ]
    return sorted({key for spec in specs for key in spec.model_fields})
