"""Who teaches: one specification per kind of teacher."""

from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import Field, NonNegativeInt, model_validator

from cvlm.config.models import Strict, StudentSpec


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
    options: dict[str, Any] = Field(default_factory=dict)

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
