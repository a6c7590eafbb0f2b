"""Dual encoders as teachers: CLIP, SigLIP and open_clip embed picture and text apart and compare the two vectors."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Self

from PIL.Image import Image

from distill.errors import DistillError
from distill.signal import Request, Signal
from distill.teachers.base import check_pairs
from distill.teachers.dual_encoders import DualEncoder, OpenClipDualEncoder, TransformersDualEncoder
from distill.teachers.transformers_common import read_config

FIELDS = frozenset({"similarity", "image_embedding", "text_embedding"})


class DualTeacher:
    """A frozen dual encoder that teaches.

    What its signal holds: `image_embedding` and `text_embedding`, unit vectors; `similarity`, their cosines times the
    model's own scale (plus SigLIP's bias, which cancels wherever rows or columns pass through a softmax). Picture and
    text never meet, so there are no answers, no maps and no layouts.

    Args:
        name: how messages call it.
        encoder: the dual encoder; its model has a `logit_scale` and perhaps a `logit_bias`.
    """

    fields = FIELDS
    depth = 0

    def __init__(self, name: str, encoder: DualEncoder) -> None:
        self.name = name
        self.encoder = encoder
        self.fingerprint = encoder.fingerprint

    def prepare(self, images: Sequence[Image], texts: Sequence[str]) -> dict[str, Any]:
        """Preprocess `b` pairs as the model's own processor does; texts are cut at its number of positions.

        Raises:
            DistillError: if there are no pairs, or not as many pictures as texts.
        """
        check_pairs(self.name, images, texts)
        return {
            "images": self.encoder.prepare_images([image.convert("RGB") for image in images]),
            "texts": self.encoder.prepare_texts(texts),
        }

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
        image, text = self.encoder.image_vectors(inputs["images"]), self.encoder.text_vectors(inputs["texts"])
        scale, bias = self.encoder.model.logit_scale, getattr(self.encoder.model, "logit_bias", None)
        similarity = image @ text.T * scale.exp() + (0.0 if bias is None else bias)
        found = {"image_embedding": image, "text_embedding": text, "similarity": similarity}
        return Signal(**{field: found[field] for field in request.fields})

    def to(self, device: Any) -> Self:
        """Move the model to a device and return the teacher."""
        self.encoder.to(device)
        return self


class ClipTeacher(DualTeacher):
    """A `CLIPModel` of transformers (Radford et al., ICML 2021).

    Args:
        name: a hub name such as `openai/clip-vit-base-patch32`, or a folder with the model and its processor.

    Raises:
        DistillError: if anything cannot be loaded, or it is another model.
    """

    def __init__(self, name: str | Path) -> None:
        super().__init__(f"clip ({name})", _load(name, "clip"))


class SiglipTeacher(DualTeacher):
    """A `SiglipModel` of transformers (Zhai et al., ICCV 2023) or a `Siglip2Model`, of fixed picture size or NaFlex.

    Args:
        name: a hub name such as `google/siglip-base-patch16-224`, or a folder with the model and its processor.

    Raises:
        DistillError: if anything cannot be loaded, or it is another model.
    """

    def __init__(self, name: str | Path) -> None:
        super().__init__(f"siglip ({name})", _load(name, "siglip", "siglip2"))


class OpenClipTeacher(DualTeacher):
    """A model of open_clip; see `OpenClipDualEncoder`."""

    def __init__(self, name: str) -> None:
        super().__init__(f"open_clip ({name})", OpenClipDualEncoder(str(name)))


def _load(name: str | Path, *kinds: str) -> TransformersDualEncoder:
    """Load a model of one of some types; the first is the teacher's kind."""
    source, config = read_config(name, example="openai/clip-vit-base-patch32")
    if config.model_type not in kinds:
        raise DistillError(
            f"{str(name)!r} is a model of type {config.model_type!r}, a {kinds[0]} teacher needs "
            f"{' or '.join(map(repr, kinds))}; choose the teacher's kind that fits"
        )
    # Targets that were stored come from this implementation; another one rounds differently.
    return TransformersDualEncoder(source, config, attention="eager")
