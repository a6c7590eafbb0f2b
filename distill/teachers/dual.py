"""Dual encoders as teachers: CLIP, SigLIP and open_clip embed picture and text apart and compare the two vectors."""

import difflib
import json
from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Any, Self

import torch
from PIL.Image import Image
from torch import Tensor, nn
from torch.nn.functional import normalize

from distill.errors import DistillError
from distill.signal import Request, Signal
from distill.teachers.base import check_pairs
from distill.teachers.transformers_common import attempt, fingerprint_of, load_model, read_config

FIELDS = frozenset({"similarity", "image_embedding", "text_embedding"})
FULL_PADDING = ("siglip", "siglip2")
"""Trained on texts padded to full length without a mask: shorter padding, or a mask, gives other embeddings."""
LIBRARIES = ("torch", "torchvision", "transformers", "tokenizers", "pillow", "open_clip_torch")
PROBE = "A tabby cat, 2 dogs & a café."


class DualTeacher(ABC):
    """A frozen dual encoder with its own preprocessing, cropping included.

    What its signal holds: `image_embedding` and `text_embedding`, unit vectors; `similarity`, their cosines times the
    model's own scale (plus SigLIP's bias, which cancels wherever rows or columns pass through a softmax). Picture and
    text never meet, so there are no answers, no maps and no layouts.

    Args:
        name: how messages call it.
        model: the model.
        facts: whatever else decides a signal.
    """

    fields = FIELDS
    depth = 0

    def __init__(self, *, name: str, model: nn.Module, facts: Mapping[str, Any]) -> None:
        self.name = name
        self._model: Any = model.eval().requires_grad_(False)
        self._device = torch.device("cpu")
        libraries = {library: version(library) for library in LIBRARIES}
        self.fingerprint = fingerprint_of({**facts, "libraries": libraries}, model)

    @abstractmethod
    def _pictures(self, images: Sequence[Image]) -> dict[str, Tensor]:
        """Preprocess pictures."""

    @abstractmethod
    def _texts(self, texts: Sequence[str]) -> dict[str, Tensor]:
        """Tokenise texts."""

    @abstractmethod
    def _embed(self, inputs: Mapping[str, Tensor]) -> tuple[Tensor, Tensor]:
        """Return the vectors of pictures and of texts, `[b, e]` each, of any length."""

    def prepare(self, images: Sequence[Image], texts: Sequence[str]) -> dict[str, Tensor]:
        """Preprocess `b` pairs as the model's own processor does; texts are cut at its number of positions.

        Raises:
            DistillError: if there are no pairs, or not as many pictures as texts.
        """
        check_pairs(self.name, images, texts)
        return {**self._pictures([image.convert("RGB") for image in images]), **self._texts(texts)}

    def signal(self, inputs: Mapping[str, Any], request: Request) -> Signal:
        """Run both encoders on prepared inputs.

        Raises:
            DistillError: if the request asks for what a dual encoder does not have.
        """
        layers = request.attention_layers | request.hidden_layers | request.projection_layers
        unknown = [*sorted(request.fields - FIELDS), *(["layers"] if layers else [])]
        if unknown:
            raise DistillError(
                f"{self.name} cannot give {', '.join(unknown)}: picture and text never meet in it; it gives "
                f"{', '.join(sorted(FIELDS))}"
            )
        with torch.no_grad():
            embedded = self._embed({key: value.to(self._device) for key, value in inputs.items()})
            image, text = (normalize(vectors, dim=-1) for vectors in embedded)
            bias = getattr(self._model, "logit_bias", None)
            similarity = image @ text.T * self._model.logit_scale.exp() + (0.0 if bias is None else bias)
        found = {"image_embedding": image, "text_embedding": text, "similarity": similarity}
        return Signal(**{field: found[field] for field in request.fields})

    def to(self, device: Any) -> Self:
        """Move the model to a device and return the teacher."""
        self._model.to(device)
        self._device = torch.device(device)
        return self


class TransformersDualTeacher(DualTeacher):
    """A `CLIPModel` (Radford et al., ICML 2021), `SiglipModel` (Zhai et al., ICCV 2023) or `Siglip2Model`.

    Args:
        name: a hub name such as `openai/clip-vit-base-patch32`, or a folder with the model and its processor.

    Raises:
        DistillError: if anything cannot be loaded, or it is another model.
    """

    kinds: tuple[str, ...] = ("clip",)

    def __init__(self, name: str | Path) -> None:
        from transformers import AutoModel, AutoProcessor

        source, config = read_config(name, example="openai/clip-vit-base-patch32")
        if config.model_type not in self.kinds:
            raise DistillError(
                f"{str(name)!r} is a model of type {config.model_type!r}, a {self.kinds[0]} teacher needs "
                f"{' or '.join(map(repr, self.kinds))}; choose the teacher's kind that fits"
            )
        self._processor = attempt(AutoProcessor.from_pretrained, source, what="processor")
        absent = [part for part in ("tokenizer", "image_processor") if not hasattr(self._processor, part)]
        if absent:
            raise DistillError(f"{source!r} has no {' and no '.join(absent)}; save the model's whole processor there")
        self._full_padding = config.model_type in FULL_PADDING
        tokenizer = self._processor.tokenizer
        self._max_text = min(tokenizer.model_max_length, config.text_config.max_position_embeddings)
        facts = {
            "config": {key: value for key, value in config.to_dict().items() if key != "_name_or_path"},
            "pictures": self._processor.image_processor.to_dict(),
            "vocabulary": tokenizer.get_vocab(),
            "probe": self._texts([PROBE])["input_ids"].tolist(),
        }
        super().__init__(name=f"{self.kinds[0]} ({name})", model=load_model(source, AutoModel), facts=facts)

    def _pictures(self, images: Sequence[Image]) -> dict[str, Tensor]:
        # Not through the whole processor: SigLIP 2's puts a patch size of its own over the saved one.
        return dict(self._processor.image_processor(images=list(images), return_tensors="pt"))

    def _texts(self, texts: Sequence[str]) -> dict[str, Tensor]:
        encoded = self._processor.tokenizer(
            list(texts),
            padding="max_length" if self._full_padding else "longest",
            truncation=True,
            max_length=self._max_text,
            return_tensors="pt",
        )
        names = ("input_ids",) if self._full_padding else ("input_ids", "attention_mask")
        return {name: encoded[name] for name in names}

    def _embed(self, inputs: Mapping[str, Tensor]) -> tuple[Tensor, Tensor]:
        text = {name: inputs[name] for name in ("input_ids", "attention_mask") if name in inputs}
        image = {name: value for name, value in inputs.items() if name not in text}
        images, texts = self._model.get_image_features(**image), self._model.get_text_features(**text)
        return images.pooler_output, texts.pooler_output


class ClipTeacher(TransformersDualTeacher):
    """CLIP of transformers; see `TransformersDualTeacher`."""


class SiglipTeacher(TransformersDualTeacher):
    """SigLIP or SigLIP 2 of transformers, of fixed picture size or NaFlex; see `TransformersDualTeacher`."""

    kinds = ("siglip", "siglip2")


class OpenClipTeacher(DualTeacher):
    """A model of open_clip (Ilharco et al. 2021).

    Args:
        name: `MODEL/WEIGHTS` such as `ViT-B-16/laion2b_s34b_b88k`, `local-dir:FOLDER` or `hf-hub:NAME`.

    Raises:
        DistillError: if model or weights are unknown or unnamed, or cannot be fetched.
    """

    def __init__(self, name: str) -> None:
        import open_clip
        from open_clip.transform import PreprocessCfg, image_transform_v2

        architecture, weights = _split(str(name))
        model = attempt(
            open_clip.create_model,
            architecture,
            what="weights",
            pretrained=weights,
            require_pretrained=True,
            pretrained_text=False,
        )
        settings = open_clip.get_model_preprocess_cfg(model)
        self._transform = image_transform_v2(PreprocessCfg(**settings), is_train=False)
        self._tokenizer = attempt(open_clip.get_tokenizer, architecture, what="tokenizer")
        probe = self._tokenizer([PROBE]).tolist()
        facts = {"pictures": json.dumps(settings, sort_keys=True, default=str), "probe": probe}
        super().__init__(name=f"open_clip ({name})", model=model, facts=facts)

    def _pictures(self, images: Sequence[Image]) -> dict[str, Tensor]:
        return {"pixels": torch.stack([self._transform(image) for image in images])}

    def _texts(self, texts: Sequence[str]) -> dict[str, Tensor]:
        return {"tokens": self._tokenizer(list(texts))}

    def _embed(self, inputs: Mapping[str, Tensor]) -> tuple[Tensor, Tensor]:
        return self._model.encode_image(inputs["pixels"]), self._model.encode_text(inputs["tokens"])


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
