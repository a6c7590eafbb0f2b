"""How a phase trains: objectives, schedule, engine; and what repeats or feeds phases."""

from pathlib import Path
from typing import Any, Literal

from pydantic import ConfigDict, Field, field_validator, model_validator

from cvlm.config.models import Strict
from cvlm.config.teachers import CompanionSpec


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
