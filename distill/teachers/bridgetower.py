"""BridgeTower as a teacher: two streams that look at each other, layer by layer."""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from distill.layout import ImageLayout
from distill.signal import PROJECTIONS, Request
from distill.teachers.joint import recorded_projections, text_fields
from distill.teachers.pair import PairTeacher
from distill.teachers.transformers_common import height_width, load_config, load_parts, patch_grid

EXAMPLE = "BridgeTower/bridgetower-base-itm-mlm"
MATCHING, CONTRASTIVE = "BridgeTowerForImageAndTextRetrieval", "BridgeTowerForContrastiveLearning"
FIELDS_OF = {
    MATCHING: frozenset({"logits", "similarity"}),
    CONTRASTIVE: frozenset({"similarity", "image_embedding", "text_embedding"}),
}


class BridgeTowerTeacher(PairTeacher):
    """A white-box teacher from `transformers.BridgeTowerModel` (Xu et al., AAAI 2023, arXiv:2206.08657).

    Image tokens are `[CLS] patches`. What its signal holds: `text_to_image` and `image_to_text` of the cross-modal
    layers' cross-attention, `hidden`, and `queries`, `keys` and `values` of self-attention in their text stream;
    `pooled`, the poolers' outputs of text and image side by side. With a matching head also `logits` over `no` and
    `yes`, and `similarity`, the logit of `yes` for every image with every text: `b` passes of the whole model over `b`
    texts. With contrastive heads `image_embedding`, `text_embedding`, and their cosines times the temperature as
    `similarity`.

    Args:
        name: a hub name such as `BridgeTower/bridgetower-base-itm-mlm`, or a folder with model, tokenizer and image
            processor.

    Raises:
        DistillError: if anything cannot be loaded or is no BridgeTower.
    """

    def __init__(self, name: str | Path) -> None:
        source, config = load_config(name, model_type="bridgetower", example=EXAMPLE)
        saved = (config.architectures or [""])[0]
        self._saved = saved if saved in FIELDS_OF else "BridgeTowerModel"
        text, vision = config.text_config, config.vision_config
        grid = patch_grid(vision.image_size, vision.patch_size, name=f"bridgetower ({name})")
        parts = load_parts(source, architecture=self._saved, text_config=text, picture=height_width(vision.image_size))
        # Positions are counted from behind the padding token's number, as in RoBERTa.
        positions = text.max_position_embeddings - text.pad_token_id - 1
        fields = frozenset({"text_to_image", "image_to_text", "hidden", *PROJECTIONS, "pooled"})
        super().__init__(
            name=f"bridgetower ({name})",
            parts=replace(parts, max_text=min(parts.max_text, positions)),
            fields=fields | FIELDS_OF.get(self._saved, frozenset()),
            depth=config.num_hidden_layers,
            image_layout=ImageLayout(grid=grid, special=1),
        )
        self.answers = ("no", "yes") if self._saved == MATCHING else None

    def _record(self, inputs: Mapping[str, Tensor], request: Request) -> dict[str, Any]:
        model = self._parts.model
        base = getattr(model, "bridgetower", model)
        texts, images = base.cross_modal_text_layers, base.cross_modal_image_layers
        with (
            recorded_projections(texts, request, path="attention.self") as projections,
            _outputs(texts) as from_text,
            _outputs(images) as from_image,
            _outputs([base]) as whole,
        ):
            output = self._run(inputs)
        # A cross-modal layer returns its states, its self-attention and its cross-attention; the model drops the last.
        states = [layer[0] for layer in from_text]
        found: dict[str, Any] = dict(text_fields(request, states=states, projections=projections))
        if request.attention_layers:
            for field, layers in (("text_to_image", from_text), ("image_to_text", from_image)):
                found[field] = {i: layers[i][2] for i in sorted(request.attention_layers)}
        if "pooled" in request.fields:
            found["pooled"] = whole[0].pooler_output
        return found | self._head(output, inputs, request)

    def _head(self, output: Any, inputs: Mapping[str, Tensor], request: Request) -> dict[str, Any]:
        found: dict[str, Any] = {}
        if self._saved == MATCHING:
            found["logits"] = output.logits
            if "similarity" in request.fields:
                found["similarity"] = torch.stack([self._match(picture, inputs) for picture in inputs["pixel_values"]])
        elif self._saved == CONTRASTIVE:
            found = {"image_embedding": output.image_embeds, "text_embedding": output.text_embeds}
            scale = self._parts.model.logit_scale.exp()
            found["similarity"] = output.image_embeds @ output.text_embeds.T * scale
        return {field: value for field, value in found.items() if field in request.fields}

    def _match(self, picture: Tensor, inputs: Mapping[str, Tensor]) -> Tensor:
        """Return the match logits `[b]` of one picture `[3, h, w]` with every text."""
        pictures = picture.expand(len(inputs["input_ids"]), *picture.shape)
        logits: Tensor = self._run({**inputs, "pixel_values": pictures}).logits
        return logits[:, 1]

    def _run(self, inputs: Mapping[str, Tensor]) -> Any:
        names = ("input_ids", "attention_mask", "pixel_values")
        return self._parts.model(**{name: inputs[name] for name in names})


@contextmanager
def _outputs(modules: nn.ModuleList | list[nn.Module]) -> Iterator[list[Any]]:
    """Record what modules return while they run, in the order of their runs."""
    found: list[Any] = []
    hooks = [module.register_forward_hook(lambda _, __, output: found.append(output)) for module in modules]
    try:
        yield found
    finally:
        for hook in hooks:
            hook.remove()
