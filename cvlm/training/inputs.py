"""From pair indices to model inputs: stored encoder outputs where a tower is frozen, live preprocessing elsewhere."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import nn

from cvlm.cost import PhaseMeter, count_flops
from cvlm.data import CaptionWords, Examples, StoredTokens, encode_once
from cvlm.encoders import EncoderOutput, is_frozen
from cvlm.model import CVLM
from cvlm.progress import Progress

Indices = NDArray[np.int64]


@dataclass(frozen=True, kw_only=True)
class ModelInputs:
    """The two inputs of one model over one split.

    Attributes:
        examples: the split.
        image: stored outputs of the vision tower, or the tower itself where it is trained; None for texts alone.
        text: likewise for text; for a captioner the words of each pair's caption.
    """

    examples: Examples
    image: StoredTokens | nn.Module | None
    text: StoredTokens | CaptionWords | nn.Module

    @property
    def stored(self) -> frozenset[str]:
        """Towers that never run again: their outputs are stored, or the model keeps what they said of each word."""
        pairs = (("vision", self.image), ("text", self.text))
        return frozenset(tower for tower, source in pairs if source is not None and not isinstance(source, nn.Module))

    def pairs(self, index: Indices) -> dict[str, Any]:
        """Return `{"image", "text"}` inputs of some pairs; two pictures take two rows, each with the text."""
        if self.image is None:
            return {"image": None, "text": self.texts(self.examples.text_of[index])}
        shown = self.examples.image_of[index].reshape(len(index), -1)
        if isinstance(self.text, CaptionWords):
            return {"image": self.images(shown.ravel()), "text": self.text.inputs(index)}
        return {
            "image": self.images(shown.ravel()),
            "text": self.texts(np.repeat(self.examples.text_of[index], shown.shape[1])),
        }

    def images(self, index: Indices) -> Any:
        """Return the inputs of some pictures."""
        assert self.image is not None, "texts alone have no pictures"
        if isinstance(self.image, StoredTokens):
            return self.image.take(index)
        return self.image.prepare([self.examples.pictures[i].load() for i in index])  # type: ignore[operator]

    def texts(self, index: Indices) -> Any:
        """Return the inputs of some texts."""
        assert not isinstance(self.text, CaptionWords), "a captioner reads no whole texts"
        if isinstance(self.text, StoredTokens):
            return self.text.take(index)
        return self.text.prepare([self.examples.texts[i] for i in index])  # type: ignore[operator]


def model_inputs(
    model: CVLM,
    examples: Examples,
    store: Path | None,
    *,
    device: str = "cpu",
    progress: Progress | None = None,
    meter: PhaseMeter | None = None,
) -> ModelInputs:
    """Store what frozen towers say about a split, and return how to feed the model.

    Args:
        model: its frozen towers run once per picture and per distinct text.
        examples: the split.
        store: folder of the stored outputs; None stores nothing and runs every tower live.
        device: where towers run.
        progress: called with (done, total).
        meter: told about the towers' work, as far as it was not stored before.
    """

    def source(encoder: nn.Module, items: Sequence[Any]) -> StoredTokens | nn.Module:
        if store is None or not is_frozen(encoder):
            return encoder
        stored = encode_once(encoder, items, store, device=device, progress=progress)
        if meter is not None and stored.encoded:
            meter.add(flops=_flops_of_one(encoder, items[0], device) * stored.encoded, samples=stored.encoded)
        return stored

    words = examples.labels if isinstance(examples.labels, CaptionWords) else None
    return ModelInputs(
        examples=examples,
        image=source(model.towers["vision"], examples.pictures) if "vision" in model.towers else None,
        text=words if words is not None else source(model.text, examples.texts),
    )


def _flops_of_one(encoder: nn.Module, item: Any, device: str) -> int:
    """Count one forward pass; texts of other lengths cost a little more or less."""
    loaded = item if isinstance(item, str) else item.load()
    prepared = move(dict(encoder.prepare([loaded])), device)  # type: ignore[operator]
    with torch.no_grad():
        return count_flops(lambda: encoder(**prepared))


def move(value: Any, device: torch.device | str) -> Any:
    """Move model inputs to a device."""
    if isinstance(value, dict):
        return {name: move(item, device) for name, item in value.items()}
    return value.to(device) if isinstance(value, torch.Tensor | EncoderOutput) else value
