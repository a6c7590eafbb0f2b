"""What a model is composed of: encoders, fusion, student."""

import re
from typing import Literal

from pydantic import BaseModel, ConfigDict, Field, field_validator, model_validator

FusionKind = Literal["co_attention", "merged", "cross", "none"]
TRAIN_MODE = re.compile(r"frozen|full|last_[1-9][0-9]*")


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
