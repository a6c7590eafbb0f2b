"""The two towers of an open_clip model, each as an encoder of its own."""

import hashlib
from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from cvlm.config import TextSpec, VisionSpec
from cvlm.encoders.base import EncoderOutput, VisionInput
from cvlm.encoders.fetch import fetching
from cvlm.encoders.image_tokens import image_output
from cvlm.encoders.open_clip_spans import encode_with_spans
from cvlm.encoders.partition import layer_index
from cvlm.encoders.pictures import PictureInput
from cvlm.encoders.text_tokens import Span, pad_batch, text_output, trim
from cvlm.encoders.timm_vision import TimmVision
from cvlm.encoders.tower import Tower
from cvlm.errors import CvlmError, unknown_name


def build_vision(name: str, spec: VisionSpec) -> nn.Module:
    """Build the vision tower of `open_clip:MODEL[/WEIGHTS]`, `open_clip:local-dir:FOLDER` or `open_clip:hf-hub:NAME`.

    Raises:
        CvlmError: model, weights, layer or image size are wrong, or the weights cannot be fetched.
    """
    from open_clip import get_model_preprocess_cfg

    model = create(name, pretrained=spec.pretrained, image_size=spec.image_size)
    config = get_model_preprocess_cfg(model)
    size = spec.image_size if spec.image_size is not None else config["size"]
    height, width = size if isinstance(size, list | tuple) else (size, size)
    picture = PictureInput(height=height, width=width, mean=tuple(config["mean"]), std=tuple(config["std"]))
    if hasattr(model.visual, "trunk"):
        return TimmVision(model.visual.trunk, picture=picture, layer=spec.layer)
    return OpenClipVision(model.visual, picture=picture, layer=spec.layer)


def build_text(name: str, spec: TextSpec) -> nn.Module:
    """Build the text tower of `open_clip:MODEL[/WEIGHTS]`.

    Raises:
        CvlmError: model, weights or layer are wrong, the weights cannot be fetched, or the model brings no CLIP
            tokenizer.
    """
    import open_clip

    model_name, _ = _split(name)
    with fetching(f"open_clip:{name}"):
        config = (open_clip.get_model_config(model_name) or {}).get("text_cfg", {})
    foreign = config.get("hf_model_name") or config.get("hf_tokenizer_name")
    if foreign:
        raise CvlmError(
            f"the text tower of 'open_clip:{name}' uses the tokenizer of {foreign!r} from transformers, which is not "
            "supported here; use a text model by 'hf:NAME', or an open_clip model with the CLIP tokenizer"
        )
    model = create(name, pretrained=spec.pretrained, image_size=None)
    with fetching(f"open_clip:{name}"):
        tokenizer = open_clip.get_tokenizer(model_name)
    return OpenClipText(model.text, tokenizer, max_length=spec.max_length, layer=spec.layer)


def create(name: str, *, pretrained: bool, image_size: int | None) -> Any:
    """Create a whole open_clip model; its text tower is always the submodule `text`.

    Raises:
        CvlmError: the model or its weights are unknown, unnamed, or cannot be fetched.
    """
    import open_clip

    model_name, tag = _split(name)
    if ":" not in model_name:
        if model_name not in open_clip.list_models():
            raise unknown_name("open_clip model", model_name, open_clip.list_models())
        tags = open_clip.list_pretrained_tags_by_model(model_name)
        if pretrained and not tag:
            raise CvlmError(
                f"'open_clip:{name}' names no weights; append one of /{', /'.join(tags) or '(none published)'}, "
                "or set pretrained: false"
            )
        if pretrained and tag not in tags:
            raise unknown_name(f"weights of {model_name}", str(tag), tags)
    with fetching(f"open_clip:{name}"):
        return open_clip.create_model(
            model_name,
            pretrained=tag if pretrained else None,
            load_weights=pretrained,
            require_pretrained=pretrained,
            pretrained_text=False,
            force_image_size=image_size,
            force_custom_text=True,
        )


class OpenClipVision(Tower):
    """A vision tower of open_clip: its VisionTransformer, or its ModifiedResNet.

    Args:
        visual: the tower.
        picture: its input.
        layer: None takes the last block with the final norm; a number the raw output of that block (or stage, the
            stem being 0), and everything behind it is removed.

    Raises:
        CvlmError: there is no such layer, or the tower cannot run on `picture`.
    """

    def __init__(self, visual: nn.Module, *, picture: PictureInput, layer: int | None = None) -> None:
        super().__init__(visual, f"layer {layer} | {picture}")
        self.picture = picture
        tower: Any = visual
        self.transformer = hasattr(tower, "transformer")
        depth = len(tower.transformer.resblocks) if self.transformer else 5
        self.layer = layer_index(-1 if layer is None else layer, depth, visual)
        # CoCa normalises behind its attention pooling, in another width than that of the tokens.
        self.norm = self.transformer and layer is None and tower.attn_pool is None
        if self.transformer:
            tower.prune_intermediate_layers([self.layer])
        self.settle({"pixel_values": torch.zeros(1, 3, picture.height, picture.width)})

    def prepare(self, inputs: Sequence[VisionInput]) -> dict[str, Tensor]:
        """Return `pixel_values` `[b, 3, height, width]` for pictures of any mode and size."""
        return {"pixel_values": self.picture.batch(inputs)}

    def forward(self, pixel_values: Tensor) -> EncoderOutput:
        """Encode `pixel_values` `[b, 3, height, width]`."""
        visual: Any = self.model
        found = visual.forward_intermediates(
            pixel_values,
            indices=[self.layer],
            normalize_intermediates=self.norm,
            intermediates_only=True,
            output_extra_tokens=True,
        )
        height, width = pixel_values.shape[-2:]
        features = found["image_intermediates"][0]
        if "image_intermediates_prefix" not in found:
            return image_output(features, height=height, width=width)
        prefix = found["image_intermediates_prefix"][0]
        tokens = torch.cat([prefix, features.flatten(2).transpose(1, 2)], dim=1)
        return image_output(tokens, height=height, width=width, special=prefix.shape[1])

    def layers(self) -> list[list[str]]:
        """Partition the parameter names into embeddings and blocks, or into the stem and the four stages."""
        if self.transformer:
            return super().layers()
        stages: list[list[str]] = [[] for _ in range(5)]
        for name, _ in self.named_parameters():
            part = name.split(".")[1]
            stages[int(part[-1]) if part.startswith("layer") else 0].append(name)
        return [stage for stage in stages if stage]


class OpenClipText(Tower):
    """A text tower of open_clip with the CLIP tokenizer.

    Args:
        text: an open_clip `TextTransformer`.
        tokenizer: an open_clip `SimpleTokenizer`.
        max_length: longer texts are cut to this many tokens, start and end included, or to the context length.
        layer: None takes the last block with the final norm; a number the raw output of that block, and everything
            behind it is removed.

    Raises:
        CvlmError: there is no such layer, or the tower is of another kind.
    """

    def __init__(self, text: nn.Module, tokenizer: Any, *, max_length: int = 77, layer: int | None = None) -> None:
        super().__init__(text, "")
        tower: Any = text
        if not hasattr(tower, "token_embedding") or getattr(tower, "use_pad_mask", False):
            raise CvlmError(f"the text tower is a {type(text).__name__}; supported is open_clip's causal one")
        self.tokenizer = tokenizer
        self.max_length = min(max_length, tower.context_length)
        vocabulary = hashlib.sha256("\n".join(tokenizer.encoder).encode()).hexdigest()
        cleaning = getattr(tokenizer.clean_fn, "__name__", "")
        self.preprocessing = f"layer {layer} | CLIP {vocabulary} {cleaning} max_length {self.max_length}"
        self.layer = layer_index(-1 if layer is None else layer, len(tower.transformer.resblocks), text)
        self.norm = layer is None
        tower.prune_intermediate_layers([self.layer])
        self.settle(self.prepare(["a"]))

    def prepare(self, inputs: Sequence[str]) -> dict[str, Tensor]:
        """Tokenize texts.

        Returns:
            `input_ids` and `attention_mask` `[b, n]`, `spans` `[b, n, 2]` in characters of the given strings.
        """
        rows: list[tuple[list[int], list[Span]]] = []
        for text in inputs:
            ids, spans = encode_with_spans(self.tokenizer, text)
            room = self.max_length - 2
            rows.append(
                (
                    [self.tokenizer.sot_token_id, *ids[:room], self.tokenizer.eot_token_id],
                    [(0, 0), *(trim(text, start, end) for start, end in spans[:room]), (0, 0)],
                )
            )
        return pad_batch(rows, padding=0)

    def forward(self, input_ids: Tensor, attention_mask: Tensor, spans: Tensor) -> EncoderOutput:
        """Encode what `prepare` returned."""
        tower: Any = self.model
        length = input_ids.shape[1]
        causal = tower.attn_mask
        if causal is None:
            # Trained without any mask, padding in full view: the states are right only with all of it.
            input_ids = F.pad(input_ids, (0, tower.context_length - length))
        else:
            causal = causal[:length, :length]
        states = tower.token_embedding(input_ids) + tower.positional_embedding[: input_ids.shape[1]]
        states = tower.transformer(states, attn_mask=causal)
        if self.norm:
            states = tower.ln_final(states)
        return text_output(states[:, :length], attention_mask, spans)


def _split(name: str) -> tuple[str, str | None]:
    """Split `MODEL/WEIGHTS`; names with a schema (`local-dir:`, `hf-hub:`) carry their weights themselves."""
    if ":" in name:
        return name, None
    model_name, _, tag = name.partition("/")
    return model_name, tag or None
