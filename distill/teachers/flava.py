"""FLAVA as a teacher: its multimodal encoder is called directly, for `FlavaModel` hides that encoder's attention."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import normalize

from distill.errors import DistillError
from distill.layout import ImageLayout
from distill.signal import PROJECTIONS, Request
from distill.teachers.joint import JointPass, recorded_projections
from distill.teachers.pair import LAYOUT_FIELDS, PairTeacher
from distill.teachers.transformers_common import height_width, load_config, load_parts, patch_grid

EXAMPLE = "facebook/flava-full"


class FlavaTeacher(PairTeacher):
    """A white-box teacher from `transformers.FlavaModel` (Singh et al., CVPR 2022, arXiv:2112.04482).

    The joint sequence is `[multimodal CLS] [image CLS] patches text`, the first only if the configuration has it. The
    multimodal CLS belongs to neither side and is in no map. Padded text is masked as a key in the text encoder and in
    the multimodal encoder alike.

    What its signal holds: `text_to_image`, `image_to_text` and `hidden` (before the final normalisation) of the
    multimodal layers, `queries`, `keys` and `values` of their attention; `pooled`, the normalised state at position 0
    of the joint sequence, which FLAVA's classifiers read; `similarity`, the contrastive scores of the two unimodal
    encoders times the temperature; `logits`, if a head is given.

    Args:
        name: a hub name such as `facebook/flava-full`, or a folder with model, tokenizer and image processor.
        head: a safetensors file with `weight` `[n_answers, d]` and `bias` `[n_answers]`, read from `pooled`.
        answers: the answer strings of the head, in order.

    Raises:
        DistillError: if anything cannot be loaded, is no FLAVA, or the head does not fit.
    """

    def __init__(self, name: str | Path, *, head: Path | None = None, answers: Sequence[str] | None = None) -> None:
        source, config = load_config(name, model_type="flava", example=EXAMPLE)
        image = config.image_config
        grid = patch_grid(image.image_size, image.patch_size, name=f"flava ({name})")
        classifier = _load_head(head, answers, config.multimodal_config.hidden_size)
        parts = load_parts(
            source,
            architecture="FlavaModel",
            text_config=config.text_config,
            picture=height_width(image.image_size),
            head=classifier,
        )
        fields = {"text_to_image", "image_to_text", "hidden", *PROJECTIONS, "pooled", "similarity"}
        super().__init__(
            name=f"flava ({name})",
            parts=parts,
            fields=frozenset(fields if classifier is None else fields | {"logits"}),
            depth=config.multimodal_config.num_hidden_layers,
            image_layout=ImageLayout(grid=grid, special=1),
        )
        self.answers = None if answers is None else tuple(answers)

    def multimodal_state(self) -> dict[str, Tensor]:
        """Return the multimodal encoder's weights under transformers' names, to initialise a fusion module with."""
        return dict(self._parts.model.multimodal_model.state_dict())

    def _record(self, inputs: Mapping[str, Tensor], request: Request) -> dict[str, Any]:
        model = self._parts.model
        image = model.image_model(pixel_values=inputs["pixel_values"], output_hidden_states=True)
        text = model.text_model(
            input_ids=inputs["input_ids"],
            attention_mask=inputs["attention_mask"],
            token_type_ids=inputs.get("token_type_ids"),
            output_hidden_states=True,
        )
        found: dict[str, Any] = {}
        if "similarity" in request.fields:
            found["similarity"] = _similarity(model, image.last_hidden_state, text.last_hidden_state)
        layers = request.attention_layers | request.hidden_layers | request.projection_layers
        if request.fields - LAYOUT_FIELDS - {"similarity"} or layers:
            # FLAVA feeds the joint encoder the unimodal states from before their final normalisation.
            found |= self._fuse(image.hidden_states[-1], text.hidden_states[-1], inputs["attention_mask"], request)
        return found

    def _fuse(self, image: Tensor, text: Tensor, text_mask: Tensor, request: Request) -> dict[str, Any]:
        """Run the multimodal encoder on `image` `[b, n_image, d_image]` and `text` `[b, n_text, d_text]`."""
        model = self._parts.model
        joint = torch.cat([model.image_to_mm_projection(image), model.text_to_mm_projection(text)], dim=1)
        # The encoder puts its CLS in front by itself, but expects a mask that counts it.
        offset = int(model.multimodal_model.use_cls_token)
        seen = torch.ones(text.shape[0], offset + image.shape[1], dtype=text_mask.dtype, device=text_mask.device)
        with recorded_projections(model.multimodal_model.encoder.layer, request) as projections:
            output = model.multimodal_model(
                joint,
                attention_mask=torch.cat([seen, text_mask], dim=1),
                output_attentions=bool(request.attention_layers),
                output_hidden_states=bool(request.hidden_layers),
            )
        start = offset + image.shape[1]
        found: dict[str, Any] = dict(
            JointPass(
                text=slice(start, start + text.shape[1]),
                image=slice(offset, start),
                keep=text_mask.bool(),
                attentions=output.attentions,
                states=output.hidden_states,
                projections=projections,
            ).record(request)
        )
        pooled = output.last_hidden_state[:, 0].clone()
        if "pooled" in request.fields:
            found["pooled"] = pooled
        if "logits" in request.fields:
            found["logits"] = self._parts.head(pooled)
        return found


def _similarity(model: Any, image: Tensor, text: Tensor) -> Tensor:
    """Contrastive scores `[b, b]` of image i with text j, as `FlavaGlobalContrastiveHead` computes them."""
    image_vector = normalize(model.image_projection(image[:, 0]), dim=-1)
    text_vector = normalize(model.text_projection(text[:, 0]), dim=-1)
    return image_vector @ text_vector.T * model.logit_scale.exp()


def _load_head(path: Path | None, answers: Sequence[str] | None, width: int) -> nn.Linear | None:
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    if path is None:
        if answers is not None:
            raise DistillError(f"{len(answers)} answers but no head to score them; give head=FILE.safetensors as well")
        return None
    try:
        tensors = load_file(path)
    except (OSError, SafetensorError) as error:
        raise DistillError(
            f"could not read the answer head {str(path)!r}: {error}; give a safetensors file with weight and bias"
        ) from error
    shapes = {key: tuple(tensor.shape) for key, tensor in tensors.items()}
    count = shapes.get("bias", (0,))[0]
    if shapes != {"weight": (count, width), "bias": (count,)} or (answers is not None and len(answers) != count):
        raise DistillError(
            f"answer head {str(path)!r} holds {shapes} for {'unnamed' if answers is None else len(answers)} answers; "
            f"it needs weight [n_answers, {width}] and bias [n_answers]"
        )
    head = nn.Linear(width, count)
    head.load_state_dict({key: tensor.float() for key, tensor in tensors.items()})
    return head
