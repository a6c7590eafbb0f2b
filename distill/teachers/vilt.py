"""ViLT as a teacher, with its patches in order: transformers' own image embedding shuffles them."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from distill.layout import ImageLayout
from distill.signal import PROJECTIONS, Request
from distill.teachers.joint import JointPass, recorded_projections
from distill.teachers.pair import PairTeacher
from distill.teachers.transformers_common import height_width, load_config, load_parts, patch_grid

EXAMPLE = "dandelin/vilt-b32-finetuned-vqa"
WITH_ANSWERS = "ViltForQuestionAnswering"


class ViltTeacher(PairTeacher):
    """A white-box teacher from `transformers.ViltModel` (Kim et al., ICML 2021, arXiv:2102.03334).

    The joint sequence is `text [image CLS] patches`. What its signal holds: `text_to_image`, `image_to_text` and
    `hidden` (before the final normalisation) of the joint layers, `queries`, `keys` and `values` of their attention;
    `pooled`, the pooler's output that ViLT's heads read; `logits` and the attribute `answers`, if the checkpoint is a
    `ViltForQuestionAnswering`. Those logits were trained with a sigmoid per answer (binary cross-entropy), so compare
    them answer by answer, not through a softmax.

    Args:
        name: a hub name such as `dandelin/vilt-b32-finetuned-vqa`, or a folder with model, tokenizer and image
            processor.

    Raises:
        DistillError: if anything cannot be loaded or is no ViLT.
    """

    def __init__(self, name: str | Path) -> None:
        source, config = load_config(name, model_type="vilt", example=EXAMPLE)
        answering = WITH_ANSWERS in (config.architectures or ())
        grid = patch_grid(config.image_size, config.patch_size, name=f"vilt ({name})")
        parts = load_parts(
            source,
            architecture=WITH_ANSWERS if answering else "ViltModel",
            text_config=config,
            picture=height_width(config.image_size),
        )
        fields = {"text_to_image", "image_to_text", "hidden", *PROJECTIONS, "pooled"}
        super().__init__(
            name=f"vilt ({name})",
            parts=parts,
            fields=frozenset(fields | {"logits"} if answering else fields),
            depth=config.num_hidden_layers,
            image_layout=ImageLayout(grid=grid, special=1),
        )
        self.answers = tuple(config.id2label[i] for i in range(config.num_labels)) if answering else None
        self._answering = answering

    def _record(self, inputs: Mapping[str, Tensor], request: Request) -> dict[str, Any]:
        model = self._parts.model
        base = model.vilt if self._answering else model
        image = ordered_patches(base.embeddings, inputs["pixel_values"])
        with recorded_projections(base.encoder.layer, request) as projections:
            output = base(
                input_ids=inputs["input_ids"],
                attention_mask=inputs["attention_mask"],
                token_type_ids=inputs.get("token_type_ids"),
                image_embeds=image,
                # With ready embeddings the model takes this mask token by token: every patch is real.
                pixel_mask=torch.ones(image.shape[:2], dtype=torch.long, device=image.device),
                output_attentions=bool(request.attention_layers),
                output_hidden_states=bool(request.hidden_layers),
            )
        n_text = inputs["input_ids"].shape[1]
        found: dict[str, Any] = dict(
            JointPass(
                text=slice(0, n_text),
                image=slice(n_text, n_text + image.shape[1]),
                keep=inputs["attention_mask"].bool(),
                attentions=output.attentions,
                states=output.hidden_states,
                projections=projections,
            ).record(request)
        )
        if "pooled" in request.fields:
            found["pooled"] = output.pooler_output
        if "logits" in request.fields:
            found["logits"] = model.classifier(output.pooler_output)
        return found


def ordered_patches(embeddings: Any, pixel_values: Tensor) -> Tensor:
    """Embed pictures of exactly the model's size, class token first, then patches row by row from the top left.

    `ViltEmbeddings.visual_embed` draws its patches with `torch.multinomial`, which permutes them even when all are kept
    (`max_image_length=-1` included), anew at every call and with global randomness. The model's output does not mind,
    since each patch carries its position along, but the attention's image axis would be in an unknown order. At the
    model's own size nothing is interpolated either, so what is left of that function is a sum.

    Args:
        embeddings: a `ViltEmbeddings`.
        pixel_values: `[b, 3, h, w]`.

    Returns:
        `[b, 1 + rows * columns, d]` before the modality embedding, which the model adds itself.
    """
    patches = embeddings.patch_embeddings(pixel_values).flatten(2).transpose(1, 2)
    first = embeddings.cls_token.expand(patches.shape[0], -1, -1)
    return torch.cat([first, patches], dim=1) + embeddings.position_embeddings
