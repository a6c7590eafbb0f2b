"""Teachers with one joint sequence (FLAVA, ViLT): cut both cross-modal directions out of its self-attention."""

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Self

import torch
from PIL.Image import Image
from torch import Tensor

from distill.errors import DistillError
from distill.layout import ImageLayout, TextLayout
from distill.signal import Request, Signal
from distill.teachers.transformers_common import Parts, pixels, tokens

ATTENTION_FIELDS = frozenset({"text_to_image", "image_to_text"})
LAYOUT_FIELDS = frozenset({"text_layout", "image_layout"})


def cut_block(probabilities: Tensor, *, queries: slice, keys: slice, keep: Tensor | None = None) -> Tensor:
    """Cut one block out of joint attention and renormalise it over the keys that are left.

    The renormalised block is the attention that the same scores would give if a query could see nothing but these keys.

    Args:
        probabilities: `[b, heads, n, n]` attention of the whole sequence, rows sum to 1.
        queries: positions of the queries.
        keys: positions of the keys.
        keep: `[b, n_keys]` True for real keys, None if all are. Other keys get exactly 0.

    Returns:
        `[b, heads, n_queries, n_keys]` in at least float32. Rows sum to 1; a row with no mass on any kept key is all
        zeros, for NaN would outlive every later mask.

    Raises:
        DistillError: if the probabilities are not square, or `keep` does not fit the keys.
    """
    if probabilities.dim() != 4 or probabilities.shape[-1] != probabilities.shape[-2]:
        raise DistillError(f"joint attention must be [b, heads, n, n], got shape {tuple(probabilities.shape)}")
    # Half precision sums to 1 only within 1e-3, too coarse for a target that is compared as a distribution.
    block = probabilities[:, :, queries, keys].to(torch.promote_types(probabilities.dtype, torch.float32))
    if keep is not None:
        if keep.shape != (block.shape[0], block.shape[3]):
            raise DistillError(
                f"keep must be [b, n_keys] = {(block.shape[0], block.shape[3])}, got shape {tuple(keep.shape)}"
            )
        block = block.masked_fill(~keep.bool()[:, None, None, :], 0.0)
    mass = block.sum(dim=-1, keepdim=True)
    return block / torch.where(mass > 0, mass, torch.ones_like(mass))


@dataclass(frozen=True, kw_only=True)
class JointPass:
    """What a pass through a joint encoder leaves behind.

    Attributes:
        text: positions of the text tokens in the sequence, special ones included.
        image: positions of the image tokens, in the order of the image layout.
        keep: `[b, n_text]` True where a text token is not padding.
        attentions: per layer `[b, heads, n, n]`, None if the model returned none.
        states: embedding, then the states after each layer, `[b, n, d]`; None if the model returned none.
    """

    text: slice
    image: slice
    keep: Tensor
    attentions: Sequence[Tensor | None] | None
    states: Sequence[Tensor] | None

    def record(self, request: Request) -> dict[str, dict[int, Tensor] | None]:
        """The per-layer fields of a `Signal`, for the requested layers and no other; None where nothing came back."""
        found: dict[str, dict[int, Tensor] | None] = {}
        if request.attention_layers:
            found["text_to_image"] = self._cut(request, queries=self.text, keys=self.image, keep=None)
            found["image_to_text"] = self._cut(request, queries=self.image, keys=self.text, keep=self.keep)
        if request.hidden_layers:
            # states[0] is the embedding, so layer 0 is states[1].
            states = self.states
            found["hidden"] = (
                {i: states[i + 1][:, self.text].clone() for i in sorted(request.hidden_layers)} if states else None
            )
        return found

    def _cut(self, request: Request, *, queries: slice, keys: slice, keep: Tensor | None) -> dict[int, Tensor] | None:
        if not self.attentions:
            return None
        maps = {i: self.attentions[i] for i in sorted(request.attention_layers)}
        cut = {i: cut_block(p, queries=queries, keys=keys, keep=keep) for i, p in maps.items() if p is not None}
        return cut if len(cut) == len(maps) else None


class JointTeacher(ABC):
    """What every joint-sequence teacher shares: preprocessing, freezing, and checks on both sides of a pass.

    A plain object, on purpose: it has no `train`, no `parameters` and no `state_dict`, so a trainer that holds it can
    neither switch its dropout on, nor optimise it, nor write it into a checkpoint.

    Args:
        name: how messages call it.
        parts: the frozen model and its own tokenizer and image processor.
        fields: the `Signal` fields that it promises, layouts excepted (they always come).
        depth: number of joint layers.
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
        if not images or len(images) != len(texts):
            raise DistillError(
                f"{self.name} needs as many pictures as texts, at least one pair; got {len(images)} and {len(texts)}"
            )
        return {**tokens(self._parts, texts), "pixel_values": pixels(self._parts, images)}

    def signal(self, inputs: Mapping[str, Any], request: Request) -> Signal:
        """Run the teacher on prepared inputs; see the class for what the fields mean.

        Returns:
            The requested fields on the teacher's device, with both layouts. `attention_layers` brings both directions.

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
        absent = sorted(_wanted(request) - signal.fields)
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
        unknown = sorted(_wanted(request) - self.fields)
        if unknown:
            raise DistillError(
                f"{self.name} cannot give {', '.join(unknown)}; it gives {', '.join(sorted(self.fields))}. Leave the "
                f"others out of Request.fields, or choose a teacher that has them"
            )
        layers = request.attention_layers | request.hidden_layers
        outside = sorted(layer for layer in layers if not 0 <= layer < self.depth)
        if outside:
            raise DistillError(f"{self.name} has layers 0 to {self.depth - 1}, but layers {outside} were requested")
        bare = sorted(request.fields & ATTENTION_FIELDS) if not request.attention_layers else []
        bare += ["hidden"] if "hidden" in request.fields and not request.hidden_layers else []
        if bare:
            raise DistillError(
                f"{', '.join(bare)} of {self.name} was requested without layers; name them in Request.attention_layers "
                f"or Request.hidden_layers (0 to {self.depth - 1})"
            )


def _wanted(request: Request) -> frozenset[str]:
    """Every field that a request must bring, those that follow from its layers included."""
    by_layers = ATTENTION_FIELDS if request.attention_layers else frozenset()
    return request.fields | by_layers | (frozenset({"hidden"}) if request.hidden_layers else frozenset())
