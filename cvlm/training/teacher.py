"""A trained CVLM as the teacher of another."""

from collections.abc import Mapping, Sequence
from dataclasses import replace
from hashlib import sha256
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL.Image import Image
from torch import nn

from cvlm.data import CaptionWords
from cvlm.encoders import fingerprint
from cvlm.errors import CvlmError
from cvlm.model import CVLM, load_model, take
from distill import Request, Signal, Teacher
from distill.teachers.flava import FlavaTeacher
from fusion import flava_names, initialise_fusion


class CvlmTeacher:
    """Wraps a trained CVLM as a white-box teacher; see `distill.Teacher`.

    For retrieval with a matching head, the `similarity` of a batch is the scaled cosine plus the match logit of every
    image with every text, BLIP's ranking score (Li et al. 2022): `b * b` runs of the fusion module.

    Args:
        model: the trained model; it is frozen and put into evaluation mode.
        name: how messages call it.
    """

    def __init__(self, model: CVLM, name: str = "cvlm") -> None:
        self.model = model.eval().requires_grad_(False)
        self.name = name
        self.depth = model.depth
        self.pictures = model.facts.pictures
        self.fields = model.fields - {"matching"}

    @property
    def fingerprint(self) -> str:
        """SHA-256 over all weights and the answer vocabulary."""
        digest = sha256("\0".join([self.model.task, *self.model.answers, str(self.model.spec)]).encode())
        for part in self.model.towers.values():
            digest.update(fingerprint(part).encode())
        for name, tensor in sorted(self.model.state_dict().items()):
            if not name.startswith(("vision.", "text.")):
                digest.update(name.encode() + tensor.cpu().contiguous().numpy().tobytes())
        return digest.hexdigest()

    @property
    def answers(self) -> tuple[str, ...]:
        """The vocabulary that its logits are over."""
        return self.model.answers

    def prepare(self, images: Sequence[Image], texts: Sequence[str]) -> Mapping[str, Any]:
        """Preprocess pairs with the model's own towers."""
        if not self.pictures:
            return {"image": None, "text": self.model.text.prepare(texts)}  # type: ignore[operator]
        image = self.model.vision.prepare(images)  # type: ignore[operator]
        if self.model.facts.output == "words":
            return {"image": image, "text": CaptionWords.of(texts, self.model.answers).inputs(np.arange(len(texts)))}
        return {"image": image, "text": self.model.text.prepare(texts)}  # type: ignore[operator]

    def signal(self, inputs: Mapping[str, Any], request: Request) -> Signal:
        """Run the model without gradient."""
        with torch.no_grad():
            if self.model.matching_head is not None and "similarity" in request.fields:
                return self._score_all(inputs, request)
            return self.model(inputs["image"], inputs["text"], request=request)

    def to(self, device: Any) -> "CvlmTeacher":
        """Move the model."""
        self.model.to(device)
        return self

    def _score_all(self, inputs: Mapping[str, Any], request: Request) -> Signal:
        image, text = self.model.encode_image(inputs["image"]), self.model.encode_text(inputs["text"])
        signal: Signal = self.model(image, text, request=replace(request, fields=request.fields - {"matching"}))
        assert signal.similarity is not None, "a retrieval model gives similarity"
        everything = torch.arange(len(text.tokens), device=text.tokens.device)
        rows = [self.model.match(take(image, torch.full_like(everything, i)), text) for i in range(len(image.tokens))]
        return replace(signal, similarity=signal.similarity + torch.stack(rows))


def initialise_from_teacher(student: CVLM, teacher: Teacher) -> list[str]:
    """Begin a student's fusion module with the teacher's multimodal weights, wherever names and shapes match.

    A CVLM of the same fusion kind, and FLAVA for a student of kind `merged`, have matching names.

    Returns:
        The names that were copied.

    Raises:
        CvlmError: nothing matches, or the teacher has no such weights.
    """
    if isinstance(teacher, CvlmTeacher):
        source = teacher.model.fusion.state_dict()
    elif isinstance(teacher, FlavaTeacher):
        source = flava_names(teacher.multimodal_state())
    else:
        raise CvlmError(f"the teacher {teacher.name} has no weights to initialise a fusion module with")
    copied = initialise_fusion(student.fusion, source)
    if not copied:
        raise CvlmError(
            f"no tensor of the teacher {teacher.name} fits the student's fusion module; take the same kind, width and "
            "expansion (kind merged for FLAVA), or initialise_fusion: random"
        )
    student.training_record = None  # what the teacher was trained on now stands in its weights too
    return copied


def load_cvlm_teacher(name: str | Path | CVLM, **encoders: nn.Module) -> CvlmTeacher:
    """Make a teacher of a model folder, a hub name, or a loaded model.

    Args:
        name: where the model is.
        **encoders: `vision` and `text`, where the saved model was built with instances of the user's own classes.
    """
    if isinstance(name, CVLM):
        return CvlmTeacher(name)
    return CvlmTeacher(load_model(name, **encoders), name=f"cvlm ({name})")
