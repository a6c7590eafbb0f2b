"""Dual encoders of transformers and open_clip: picture and text are embedded apart, each by its own preprocessing."""

import difflib
import json
from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from importlib.metadata import version
from typing import Any, Self

import torch
from PIL.Image import Image
from torch import Tensor, nn
from torch.nn.functional import normalize

from distill.errors import DistillError
from distill.teachers.transformers_common import attempt, fingerprint_of, load_model

FULL_PADDING = ("siglip", "siglip2")
"""Trained on texts padded to full length without a mask: shorter padding, or a mask, gives other embeddings."""
LIBRARIES = ("torch", "torchvision", "transformers", "tokenizers", "pillow", "open_clip_torch")
OPEN_CLIP_REPAIR = "check the connection, or give a folder that holds the whole model: local-dir:FOLDER"
PROBE = "A tabby cat, 2 dogs & a café."


class DualEncoder(ABC):
    """A frozen dual encoder with its own preprocessing, cropping included.

    Args:
        model: the model.
        facts: whatever else decides an embedding.

    Attributes:
        model: the model, in evaluation mode.
        fingerprint: SHA-256 over weights, facts and the versions of the libraries.
    """

    def __init__(self, *, model: nn.Module, facts: Mapping[str, Any]) -> None:
        self.model: Any = model.eval().requires_grad_(False)
        self._device = torch.device("cpu")
        libraries = {library: version(library) for library in LIBRARIES}
        self.fingerprint = fingerprint_of({**facts, "libraries": libraries}, model)

    @abstractmethod
    def prepare_images(self, pictures: Sequence[Image]) -> dict[str, Tensor]:
        """Preprocess `n` RGB pictures; returns CPU tensors."""

    @abstractmethod
    def prepare_texts(self, texts: Sequence[str]) -> dict[str, Tensor]:
        """Tokenise `n` texts, cut at the model's number of positions; returns CPU tensors."""

    @abstractmethod
    def _image_features(self, inputs: Mapping[str, Tensor]) -> Tensor:
        """Return the vectors of prepared pictures, `[n, e]`, of any length."""

    @abstractmethod
    def _text_features(self, inputs: Mapping[str, Tensor]) -> Tensor:
        """Return the vectors of tokenised texts, `[n, e]`, of any length."""

    @torch.no_grad()
    def image_vectors(self, inputs: Mapping[str, Tensor]) -> Tensor:
        """Return the unit vectors `[n, e]` of what `prepare_images` gave."""
        return normalize(self._image_features(self._here(inputs)), dim=-1)

    @torch.no_grad()
    def text_vectors(self, inputs: Mapping[str, Tensor]) -> Tensor:
        """Return the unit vectors `[n, e]` of what `prepare_texts` gave."""
        return normalize(self._text_features(self._here(inputs)), dim=-1)

    def embed_images(self, pictures: Sequence[Image]) -> Tensor:
        """Return the unit vectors `[n, e]` of RGB pictures, on the model's device."""
        return self.image_vectors(self.prepare_images(pictures))

    def embed_texts(self, texts: Sequence[str]) -> Tensor:
        """Return the unit vectors `[n, e]` of texts, on the model's device; texts that are too long are cut."""
        return self.text_vectors(self.prepare_texts(texts))

    def to(self, device: Any) -> Self:
        """Move the model to a device and return the encoder."""
        self.model.to(device)
        self._device = torch.device(device)
        return self

    def _here(self, inputs: Mapping[str, Tensor]) -> dict[str, Tensor]:
        return {name: value.to(self._device) for name, value in inputs.items()}


class TransformersDualEncoder(DualEncoder):
    """A transformers model with `get_image_features` and `get_text_features`: CLIP, SigLIP, ALIGN, Chinese-CLIP, ...

    Args:
        source: what `from_pretrained` takes, and
        config: the model's configuration; both come from `read_config`.
        attention: the implementation; None takes the model's fastest.

    Raises:
        DistillError: weights or processor are missing or do not fit.
    """

    def __init__(self, source: str, config: Any, *, attention: str | None = None) -> None:
        from transformers import AutoModel, AutoProcessor

        self._processor = attempt(AutoProcessor.from_pretrained, source, what="processor")
        absent = [part for part in ("tokenizer", "image_processor") if not hasattr(self._processor, part)]
        if absent:
            raise DistillError(f"{source!r} has no {' and no '.join(absent)}; save the model's whole processor there")
        self._source, self._full_padding = source, config.model_type in FULL_PADDING
        tokenizer, text = self._processor.tokenizer, getattr(config, "text_config", config)
        positions = getattr(text, "max_position_embeddings", tokenizer.model_max_length)
        self._max_text = min(tokenizer.model_max_length, positions)
        facts = {
            "config": {key: value for key, value in config.to_dict().items() if key != "_name_or_path"},
            "pictures": self._processor.image_processor.to_dict(),
            "vocabulary": tokenizer.get_vocab(),
            "probe": self.prepare_texts([PROBE])["input_ids"].tolist(),
        }
        super().__init__(model=load_model(source, AutoModel, attn_implementation=attention), facts=facts)

    def prepare_images(self, pictures: Sequence[Image]) -> dict[str, Tensor]:
        """Run the image processor."""
        # Not through the whole processor: SigLIP 2's puts a patch size of its own over the saved one.
        return dict(self._processor.image_processor(images=list(pictures), return_tensors="pt"))

    def prepare_texts(self, texts: Sequence[str]) -> dict[str, Tensor]:
        """Run the tokenizer."""
        encoded = self._processor.tokenizer(
            list(texts),
            padding="max_length" if self._full_padding else "longest",
            truncation=True,
            max_length=self._max_text,
            return_tensors="pt",
        )
        names = ("input_ids",) if self._full_padding else ("input_ids", "attention_mask")
        return {name: encoded[name] for name in names if name in encoded}

    def _image_features(self, inputs: Mapping[str, Tensor]) -> Tensor:
        return self._vectors(self.model.get_image_features(**inputs))

    def _text_features(self, inputs: Mapping[str, Tensor]) -> Tensor:
        return self._vectors(self.model.get_text_features(**inputs))

    def _vectors(self, features: Any) -> Tensor:
        vectors = features if isinstance(features, Tensor) else features.pooler_output
        if vectors is None or vectors.dim() != 2:
            shape = None if vectors is None else tuple(vectors.shape)
            raise DistillError(
                f"{self._source!r} gives features of shape {shape}, not one vector each; it is no dual encoder"
            )
        return vectors


class OpenClipDualEncoder(DualEncoder):
    """A model of open_clip (Ilharco et al. 2021).

    Args:
        name: `MODEL/WEIGHTS` such as `ViT-B-16/laion2b_s34b_b88k`, `local-dir:FOLDER` or `hf-hub:NAME`.

    Raises:
        DistillError: model or weights are unknown or unnamed, or cannot be fetched.
    """

    def __init__(self, name: str) -> None:
        import open_clip
        from open_clip.transform import PreprocessCfg, image_transform_v2

        architecture, weights = _split(name)
        model = attempt(
            open_clip.create_model,
            architecture,
            what="open_clip weights",
            repair=OPEN_CLIP_REPAIR,
            pretrained=weights,
            require_pretrained=True,
            pretrained_text=False,
        )
        settings = open_clip.get_model_preprocess_cfg(model)
        self._transform = image_transform_v2(PreprocessCfg(**settings), is_train=False)
        self._tokenizer = attempt(
            open_clip.get_tokenizer, architecture, what="open_clip tokenizer", repair=OPEN_CLIP_REPAIR
        )
        probe = self._tokenizer([PROBE]).tolist()
        facts = {"pictures": json.dumps(settings, sort_keys=True, default=str), "probe": probe}
        super().__init__(model=model, facts=facts)

    def prepare_images(self, pictures: Sequence[Image]) -> dict[str, Tensor]:
        """Run the model's own transform."""
        return {"pixels": torch.stack([self._transform(picture) for picture in pictures])}

    def prepare_texts(self, texts: Sequence[str]) -> dict[str, Tensor]:
        """Run the model's own tokenizer."""
        return {"tokens": self._tokenizer(list(texts))}

    def _image_features(self, inputs: Mapping[str, Tensor]) -> Tensor:
        vectors: Tensor = self.model.encode_image(inputs["pixels"])
        return vectors

    def _text_features(self, inputs: Mapping[str, Tensor]) -> Tensor:
        vectors: Tensor = self.model.encode_text(inputs["tokens"])
        return vectors


def _split(name: str) -> tuple[str, str | None]:
    """Split `MODEL/WEIGHTS`; names with a schema (`local-dir:`, `hf-hub:`) carry their weights themselves."""
    import open_clip

    if ":" in name:
        return name, None
    model, _, weights = name.partition("/")
    if model not in open_clip.list_models():
        near = difflib.get_close_matches(model, open_clip.list_models(), n=1, cutoff=0.4)
        guess = f"did you mean {near[0]!r}?" if near else "give a model of open_clip, local-dir:FOLDER or hf-hub:NAME"
        raise DistillError(f"no open_clip model {model!r}; {guess}")
    tags = open_clip.list_pretrained_tags_by_model(model)
    if weights not in tags:
        raise DistillError(f"open_clip has no weights {weights!r} of {model}; append one of /{', /'.join(tags)}")
    return model, weights
