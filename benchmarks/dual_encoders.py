"""CLIP-like models that CVLM did not build: transformers and open_clip dual encoders, by name or folder.

Each uses the preprocessing that comes with it and gives unit vectors, so that an inner product is the cosine.
"""

import hashlib
import json
from collections.abc import Sequence
from typing import Any

import torch
from PIL.Image import Image
from torch import Tensor
from torch.nn.functional import normalize

from cvlm.encoders import fingerprint
from cvlm.errors import CvlmError

FULL_PADDING = ("siglip", "siglip2")
"""Trained on texts padded to full length without a mask: shorter padding, or a mask, gives other embeddings."""


class TransformersDualEncoder:
    """A transformers model with `get_image_features` and `get_text_features`: CLIP, SigLIP, ALIGN, Chinese-CLIP, ...

    Args:
        name: a hub name or a local folder.
        device: where it runs.

    Raises:
        CvlmError: there is no such model, it is no dual encoder, or weights or its processor are missing.
    """

    def __init__(self, name: str, device: str) -> None:
        from transformers import AutoModel, AutoProcessor

        self.name, self.device = name, device
        config = _load(name, "configuration", _config_of, name)
        self.full_padding = config.model_type in FULL_PADDING
        kind: Any = AutoModel._model_mapping.get(type(config), None)
        if not (hasattr(kind, "get_image_features") and hasattr(kind, "get_text_features")):
            raise CvlmError(
                f"'hf:{name}' is a model of type {config.model_type!r}, which embeds not both pictures and texts; give "
                "a dual encoder (clip, siglip, align, chinese_clip, ...), or wrap the model yourself: module:callable"
            )
        model, report = _load(
            name, "weights", kind.from_pretrained, name, dtype=torch.float32, output_loading_info=True
        )
        missing = sorted(report["missing_keys"])
        if missing:
            raise CvlmError(f"'hf:{name}' lacks {len(missing)} weights of {kind.__name__}, for instance {missing[0]}")
        self.processor = _load(name, "processor", AutoProcessor.from_pretrained, name)
        for part in ("tokenizer", "image_processor"):
            if not hasattr(self.processor, part):
                raise CvlmError(f"'hf:{name}' has no {part}; save the model's processor into the same folder")
        self.model = model.to(device).eval().requires_grad_(False)
        text = getattr(config, "text_config", config)
        positions = getattr(text, "max_position_embeddings", self.processor.tokenizer.model_max_length)
        self.max_length = min(self.processor.tokenizer.model_max_length, positions)

    @property
    def fingerprint(self) -> str:
        """SHA-256 over weights and picture preprocessing."""
        settings = json.dumps(self.processor.image_processor.to_dict(), sort_keys=True, default=str)
        return hashlib.sha256(f"{fingerprint(self.model)} {settings} {self.max_length}".encode()).hexdigest()

    @torch.inference_mode()
    def embed_images(self, pictures: Sequence[Image]) -> Tensor:
        """Return unit vectors `[n, d]`."""
        # Not through the whole processor: SigLIP 2's puts a patch size of its own over the saved one.
        inputs = self.processor.image_processor(images=list(pictures), return_tensors="pt")
        return self._unit(self.model.get_image_features(**inputs.to(self.device)))

    @torch.inference_mode()
    def embed_texts(self, texts: Sequence[str]) -> Tensor:
        """Return unit vectors `[n, d]`; texts that are too long are cut."""
        padding = "max_length" if self.full_padding else "longest"
        inputs = self.processor.tokenizer(
            list(texts), padding=padding, truncation=True, max_length=self.max_length, return_tensors="pt"
        )
        if self.full_padding:
            inputs.pop("attention_mask", None)
        return self._unit(self.model.get_text_features(**inputs.to(self.device)))

    def _unit(self, features: Any) -> Tensor:
        vectors = features if isinstance(features, Tensor) else features.pooler_output
        if vectors is None or vectors.dim() != 2:
            shape = None if vectors is None else tuple(vectors.shape)
            raise CvlmError(
                f"'hf:{self.name}' gives features of shape {shape}, not one vector each; it is no dual encoder"
            )
        return normalize(vectors.float(), dim=-1)


class OpenClipDualEncoder:
    """An open_clip model: `MODEL/WEIGHTS`, `local-dir:FOLDER` or `hf-hub:NAME`.

    Args:
        name: what stands behind `open_clip:`.
        device: where it runs.

    Raises:
        CvlmError: model or weights are unknown, unnamed, or cannot be fetched.
    """

    def __init__(self, name: str, device: str) -> None:
        import open_clip
        from open_clip.transform import PreprocessCfg, image_transform_v2

        from cvlm.encoders.open_clip_towers import create

        self.device = device
        self.model = create(name, pretrained=True, image_size=None).to(device).eval().requires_grad_(False)
        settings = open_clip.get_model_preprocess_cfg(self.model)
        self.transform = image_transform_v2(PreprocessCfg(**settings), is_train=False)
        model_name = name if ":" in name else name.partition("/")[0]
        self.tokenizer = _load(f"open_clip:{name}", "tokenizer", open_clip.get_tokenizer, model_name)
        self.preprocessing = json.dumps(settings, sort_keys=True)

    @property
    def fingerprint(self) -> str:
        """SHA-256 over weights and picture preprocessing."""
        return hashlib.sha256(f"{fingerprint(self.model)} {self.preprocessing}".encode()).hexdigest()

    @torch.inference_mode()
    def embed_images(self, pictures: Sequence[Image]) -> Tensor:
        """Return unit vectors `[n, d]`."""
        pixels = torch.stack([self.transform(picture) for picture in pictures]).to(self.device)
        vectors: Tensor = self.model.encode_image(pixels, normalize=True)
        return vectors

    @torch.inference_mode()
    def embed_texts(self, texts: Sequence[str]) -> Tensor:
        """Return unit vectors `[n, d]`; texts that are too long are cut."""
        vectors: Tensor = self.model.encode_text(self.tokenizer(list(texts)).to(self.device), normalize=True)
        return vectors


def _config_of(name: str) -> Any:
    from transformers import AutoConfig

    return AutoConfig.from_pretrained(name)


def _load(name: str, what: str, load: Any, *arguments: Any, **settings: Any) -> Any:
    try:
        return load(*arguments, **settings)
    # RuntimeError: sizes differ. ValueError, KeyError, TypeError: transformers on files that it cannot make sense of.
    except (OSError, ValueError, RuntimeError, KeyError, TypeError, ImportError) as error:
        reason = " ".join(str(error).split())[:300] or type(error).__name__
        raise CvlmError(
            f"cannot load the {what} of {name!r}: {reason}; check the name and the connection, or give a local folder "
            "that holds the model with its processor"
        ) from error
