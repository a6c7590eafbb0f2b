"""The one interface that every teacher keeps, whatever it is inside."""

from collections.abc import Mapping, Sequence
from typing import Any, Protocol, runtime_checkable

from PIL.Image import Image

from distill.signal import Request, Signal


@runtime_checkable
class Teacher(Protocol):
    """A source of targets. It owns its preprocessing and tokenizer, and is never trained by the student's trainer.

    Attributes:
        name: how messages call it, for instance `flava (facebook/flava-full)`.
        fields: the `Signal` fields it can give. White-box teachers give all, gray-box ones logits, black-box ones
            answers only.
        depth: number of layers whose cross-modal attention it can record, 0 for none.
        fingerprint: changes whenever the same input could give another signal (weights, processor, library versions).
    """

    name: str
    fields: frozenset[str]
    depth: int
    fingerprint: str

    def prepare(self, images: Sequence[Image], texts: Sequence[str]) -> Mapping[str, Any]:
        """Preprocess `b` pairs with the teacher's own processor and tokenizer; returns CPU tensors."""
        ...

    def signal(self, inputs: Mapping[str, Any], request: Request) -> Signal:
        """Run the teacher without gradient on prepared inputs and return at least the requested fields."""
        ...

    def to(self, device: Any) -> "Teacher":
        """Move the teacher to a device and return it."""
        ...
