"""Vision encoders from timm: transformers with patch tokens, Swin-like maps, convolutional maps."""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from cvlm.config import VisionSpec
from cvlm.encoders.base import EncoderOutput, VisionInput
from cvlm.encoders.fetch import fetching
from cvlm.encoders.image_tokens import image_output
from cvlm.encoders.partition import layer_index
from cvlm.encoders.pictures import PictureInput
from cvlm.encoders.tower import Tower
from cvlm.errors import CvlmError, nearest


def build(name: str, spec: VisionSpec) -> nn.Module:
    """Build `timm:NAME`; NAME may carry a weights tag (`resnet50.a1_in1k`) or be `hf-hub:...` or `local-dir:...`.

    Raises:
        CvlmError: the name, the tag, the layer or the image size is wrong, or the weights cannot be fetched.
    """
    model = create(name, image_size=spec.image_size, pretrained=spec.pretrained, num_classes=0)
    return TimmVision(model, picture=picture_of(model, spec.image_size), layer=spec.layer)


def create(name: str, *, image_size: int | None, pretrained: bool, num_classes: int) -> nn.Module:
    """Create a timm model; `image_size` reaches the models that are built for one size, convolutions take any.

    Raises:
        CvlmError: there is no such model, or its weights cannot be fetched.
    """
    import timm

    # Names with a schema are looked up by timm itself.
    if ":" not in name and not timm.is_model(name):
        raise CvlmError(
            f"timm has no model {name!r}{nearest(name, timm.list_models())}; "
            "`python -c \"import timm; print(timm.list_models('*vit*'))\"` lists names"
        )
    settings: dict[str, Any] = {"pretrained": pretrained, "num_classes": num_classes}
    with fetching(f"timm:{name}"):
        if image_size is not None:
            try:
                return timm.create_model(name, img_size=image_size, **settings)
            except TypeError as error:
                if "img_size" not in str(error):
                    raise
        return timm.create_model(name, **settings)


def picture_of(model: nn.Module, image_size: int | None) -> PictureInput:
    """Read size, mean and std from the model's own data configuration; `image_size` overrides the size."""
    from timm.data import resolve_model_data_config

    config = resolve_model_data_config(model)
    height, width = (image_size, image_size) if image_size is not None else config["input_size"][-2:]
    return PictureInput(height=height, width=width, mean=tuple(config["mean"]), std=tuple(config["std"]))


class TimmVision(Tower):
    """A timm model without its classifier.

    Args:
        model: created with `num_classes=0`.
        picture: its input.
        layer: None takes the final features, with class and register tokens where there are any. A number takes the
            raw output of that block (transformers) or feature stage (hierarchical and convolutional models, see
            timm's `feature_info`): patch tokens only, and everything behind it is removed.

    Raises:
        CvlmError: there is no such layer, or the model cannot run on `picture`.
    """

    def __init__(self, model: nn.Module, *, picture: PictureInput, layer: int | None = None) -> None:
        super().__init__(model, f"layer {layer} | {picture}")
        self.picture = picture
        self.layer = None if layer is None else _cut_after(model, layer)
        # Models that never declared their prefix tokens have one if they have a class token.
        undeclared = int(getattr(model, "cls_token", None) is not None)
        self.special: int = getattr(model, "num_prefix_tokens", undeclared)
        self.settle({"pixel_values": torch.zeros(1, 3, picture.height, picture.width)})

    def prepare(self, inputs: Sequence[VisionInput]) -> dict[str, Tensor]:
        """Return `pixel_values` `[b, 3, height, width]` for pictures of any mode and size."""
        return {"pixel_values": self.picture.batch(inputs)}

    def forward(self, pixel_values: Tensor) -> EncoderOutput:
        """Encode `pixel_values` `[b, 3, height, width]`."""
        height, width = pixel_values.shape[-2:]
        model: Any = self.model
        if self.layer is None:
            features = model.forward_features(pixel_values)
            if isinstance(features, list | tuple):
                raise CvlmError(
                    f"{type(model).__name__} returns several token sequences; choose one with layer, such as layer: -1"
                )
            if features.dim() == 4 and getattr(model, "output_fmt", "NCHW") == "NHWC":
                features = features.permute(0, 3, 1, 2)
            return image_output(features, height=height, width=width, special=self.special)
        (features,) = model.forward_intermediates(
            pixel_values, indices=[self.layer], intermediates_only=True, stop_early=True
        )
        return image_output(features, height=height, width=width)

    def layers(self) -> list[list[str]]:
        """Partition the parameter names by timm's own grouping, from the input to the output."""
        from timm.models import group_parameters

        model: Any = self.model
        if not hasattr(model, "group_matcher"):
            return super().layers()
        groups = group_parameters(model, model.group_matcher(coarse=False))
        return [[f"model.{name}" for name in groups[index]] for index in sorted(groups)]


def _cut_after(model: Any, layer: int) -> int:
    """Remove what stands behind a layer and return its index from the front."""
    if not hasattr(model, "forward_intermediates"):
        raise CvlmError(
            f"layer is {layer}, but timm offers no earlier layers for {type(model).__name__}; leave layer unset"
        )
    index = layer_index(layer, len(model.feature_info), model)
    if hasattr(model, "prune_intermediate_layers"):
        model.prune_intermediate_layers([index], prune_norm=True)
    return index
