"""Vision encoders from transformers: ViT, DINOv2, CLIP, SigLIP, Swin, ConvNeXt, ResNet and their like."""

import inspect
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from cvlm.config import VisionSpec
from cvlm.encoders.base import EncoderOutput, VisionInput
from cvlm.encoders.hf_load import cut_after, load_model, read_config, source_of, states_of
from cvlm.encoders.image_tokens import image_output
from cvlm.encoders.pictures import PictureInput
from cvlm.encoders.tower import Tower

_GREY: tuple[float, float, float] = (0.5, 0.5, 0.5)


def build(name: str, spec: VisionSpec) -> nn.Module:
    """Build `hf:NAME` for a hub name or a local folder.

    Raises:
        CvlmError: the folder or name is wrong, or the model cannot run on the image size or layer.
    """
    config = read_config(name)
    model = load_model(name, config, "vision", spec.pretrained)
    return HfVision(model, picture=_picture_of(name, model.config, spec.image_size), layer=spec.layer)


class HfVision(Tower):
    """A vision model of transformers.

    Args:
        model: takes `pixel_values` and returns `last_hidden_state`, a sequence or a feature map.
        picture: its input.
        layer: None takes the last hidden state; a number the raw output of that block (or stage), counted without
            the embeddings, and everything behind it is removed.

    Raises:
        CvlmError: there is no such layer, or the model cannot run on `picture`.
    """

    def __init__(self, model: nn.Module, *, picture: PictureInput, layer: int | None = None) -> None:
        super().__init__(model, f"layer {layer} | {picture}")
        self.picture = picture
        self.block = None if layer is None else cut_after(model, layer)
        self.arguments = _resize_arguments(model, picture)
        self.settle({"pixel_values": torch.zeros(1, 3, picture.height, picture.width)})

    def prepare(self, inputs: Sequence[VisionInput]) -> dict[str, Tensor]:
        """Return `pixel_values` `[b, 3, height, width]` for pictures of any mode and size."""
        return {"pixel_values": self.picture.batch(inputs)}

    def forward(self, pixel_values: Tensor) -> EncoderOutput:
        """Encode `pixel_values` `[b, 3, height, width]`."""
        block = None if self.block is None else self.model.get_submodule(self.block)
        states = states_of(lambda: self.model(pixel_values=pixel_values, **self.arguments), block)
        height, width = pixel_values.shape[-2:]
        special = _special_tokens(states, self.model, height, width)
        return image_output(states, height=height, width=width, special=special)


def _special_tokens(states: Tensor, model: Any, height: int, width: int) -> int:
    """Count the class and register tokens: what is left when the patches of the picture are taken away."""
    patch = getattr(model.config, "patch_size", None)
    if states.dim() != 3 or patch is None:
        return 0
    rows, columns = patch if isinstance(patch, list | tuple) else (patch, patch)
    # Hierarchical models merge patches, so that fewer are left than their patch size says; they have no class token.
    return max(states.shape[1] - (height // rows) * (width // columns), 0)


def _resize_arguments(model: Any, picture: PictureInput) -> dict[str, bool]:
    """Ask for interpolated positions where the size differs from the trained one and the model knows how to."""
    trained = getattr(model.config, "image_size", None)
    sides = tuple(trained) if isinstance(trained, list | tuple) else (trained, trained)
    known = "interpolate_pos_encoding" in inspect.signature(model.forward).parameters
    return {"interpolate_pos_encoding": True} if known and sides != (picture.height, picture.width) else {}


def _picture_of(name: str, config: Any, image_size: int | None) -> PictureInput:
    """Read mean, std and size from the image processor; without one 0.5 and the size in the configuration."""
    from transformers import AutoImageProcessor

    try:
        processor = AutoImageProcessor.from_pretrained(source_of(name))
    except (OSError, ValueError):
        # No preprocessor_config.json; that the name itself is right was settled by the configuration.
        processor = None
    height, width = (image_size, image_size) if image_size is not None else _own_size(processor, config)
    mean = std = _GREY
    if processor is not None:
        mean = tuple(processor.image_mean) if processor.do_normalize else (0.0, 0.0, 0.0)
        std = tuple(processor.image_std) if processor.do_normalize else (1.0, 1.0, 1.0)
    return PictureInput(height=height, width=width, mean=mean, std=std)


def _own_size(processor: Any, config: Any) -> tuple[int, int]:
    """Return height and width that a model is used with: crop size, resize size, then the configuration's."""
    for source in ("crop_size", "size"):
        size = getattr(processor, source, None)
        if size and size.get("height") and size.get("width"):
            return int(size["height"]), int(size["width"])
        if size and size.get("shortest_edge"):
            return int(size["shortest_edge"]), int(size["shortest_edge"])
    trained = getattr(config, "image_size", None) or 224
    return (trained[0], trained[1]) if isinstance(trained, list | tuple) else (trained, trained)
