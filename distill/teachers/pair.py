"""What every teacher shares that reads a picture and a text together: FLAVA, ViLT, BLIP, BridgeTower, GIT."""

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from typing import Any, Self

import torch
from PIL.Image import Image
from torch import Tensor

from distill.errors import DistillError
from distill.layout import ImageLayout, TextLayout
from distill.signal import PROJECTIONS, Request, Signal
from distill.teachers.base import check_pairs
from distill.teachers.transformers_common import Parts, pixels, tokens

ATTENTION_FIELDS = frozenset({"text_to_image", "image_to_text"})
LAYOUT_FIELDS = frozenset({"text_layout", "image_layout"})


class PairTeacher(ABC):
    """A frozen transformers model, its own preprocessing, and checks on both sides of a pass.

    A plain object, on purpose: it has no `train`, no `parameters` and no `state_dict`, so a trainer that holds it can
    neither switch its dropout on, nor optimise it, nor write it into a checkpoint.

    Args:
        name: how messages call it.
        parts: the frozen model and its own tokenizer and image processor.
        fields: the `Signal` fields that it promises, layouts excepted (they always come).
        depth: number of cross-modal layers.
        image_layout: where the image tokens sit.
    """

    def __init__(
        self, *, name: str, parts: Parts, fields: frozenset[str], depth: int, image_layout: ImageLayout
    ) -> None:
        self.name = name
        self.fields = fields | LAYOUT_FIELDS
        self.depth = depth
        self.fingerprint = parts.fingerprint()
        self.image_layout = image_layout
        self._parts = parts
        self._device = torch.device("cpu")

    @abstractmethod
    def _record(self, inputs: Mapping[str, Tensor], request: Request) -> dict[str, Any]:
        """Run the model and return the requested fields, layouts excepted; None for what did not come."""

    def prepare(self, images: Sequence[Image], texts: Sequence[str]) -> dict[str, Tensor]:
        """Preprocess `b` pairs with the teacher's own processor and tokenizer.

        Pictures are squeezed to the model's square, never cropped or padded, so that the patch grid covers the whole
        picture. Texts are padded on the right to the longest and cut at the model's number of positions.

        Returns:
            CPU tensors: `pixel_values` `[b, 3, h, w]`, `input_ids`, `attention_mask` (and `token_type_ids`)
            `[b, n_text]`, `spans` `[b, n_text, 2]`.

        Raises:
            DistillError: if there are no pairs, or not as many pictures as texts.
        """
        check_pairs(self.name, images, texts)
        return {**tokens(self._parts, texts), "pixel_values": pixels(self._parts, images)}

    def signal(self, inputs: Mapping[str, Any], request: Request) -> Signal:
        """Run the teacher on prepared inputs; see the class for what the fields mean.

        Returns:
            The requested fields on the teacher's device, with both layouts. `attention_layers` brings every direction
            that the teacher has.

        Raises:
            DistillError: if the request asks for a field or layer that the teacher does not have, or if a promised
                field did not come out of the model.
        """
        self._check(request)
        moved = {key: value.to(self._device) for key, value in inputs.items()}
        # Not inference_mode: objectives keep the targets for their backward pass, which inference tensors refuse.
        with torch.no_grad():
            found = self._record(moved, request)
        signal = Signal(**found, text_layout=TextLayout(spans=moved["spans"]), image_layout=self.image_layout)
        absent = sorted(self._wanted(request) - signal.fields)
        if absent:
            raise DistillError(
                f"{self.name} promised {', '.join(absent)}, but the model returned None; the installed transformers "
                f"has changed what this model returns: install the version this package was tested with, or leave "
                f"{', '.join(absent)} out of the objectives"
            )
        return signal

    def to(self, device: Any) -> Self:
        """Move the model to a device and return the teacher."""
        self._parts.modules.to(device)
        self._device = torch.device(device)
        return self

    def _check(self, request: Request) -> None:
        unknown = sorted(self._wanted(request) - self.fields)
        if unknown:
            raise DistillError(
                f"{self.name} cannot give {', '.join(unknown)}; it gives {', '.join(sorted(self.fields))}. Leave the "
                f"others out of Request.fields, or choose a teacher that has them"
            )
        layers = request.attention_layers | request.hidden_layers | request.projection_layers
        outside = sorted(layer for layer in layers if not 0 <= layer < self.depth)
        if outside:
            raise DistillError(f"{self.name} has layers 0 to {self.depth - 1}, but layers {outside} were requested")
        bare = sorted(request.fields & ATTENTION_FIELDS) if not request.attention_layers else []
        bare += ["hidden"] if "hidden" in request.fields and not request.hidden_layers else []
        bare += sorted(request.fields & set(PROJECTIONS)) if not request.projection_layers else []
        if bare:
            raise DistillError(
                f"{', '.join(bare)} of {self.name} was requested without layers; name them in "
                f"Request.attention_layers, Request.hidden_layers or Request.projection_layers (0 to {self.depth - 1})"
            )

    def _wanted(self, request: Request) -> frozenset[str]:
        """Every field that a request must bring, those that follow from its layers included."""
        by_layers = (ATTENTION_FIELDS & self.fields or ATTENTION_FIELDS) if request.attention_layers else frozenset()
        return request.fields | by_layers | (frozenset({"hidden"}) if request.hidden_layers else frozenset())
