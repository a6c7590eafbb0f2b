"""The one interface that every teacher keeps, whatever it is inside."""

from collections.abc import Mapping, Sequence
from typing import Any, Protocol, runtime_checkable

from PIL.Image import Image

from distill.signal import Request, Signal


@runtime_checkable
class Teacher(Protocol):
    """A source of targets. It owns its preprocessing and tokenizer, and is never trained by the student's trainer.

    The four properties may be plain attributes. A teacher that gives `logits` also says what they are over, in a
    further attribute `answers` (a tuple of strings in the order of the logits), if it knows.
    """

    @property
    def name(self) -> str:
        """How messages call it, for instance `flava (facebook/flava-full)`."""
        ...

    @property
    def fields(self) -> frozenset[str]:
        """The `Signal` fields it can give. White-box: all; gray-box: logits; black-box: answers only."""
        ...

    @property
    def depth(self) -> int:
        """Number of layers whose cross-modal attention it can record, 0 for none."""
        ...

    @property
    def fingerprint(self) -> str:
        """Changes whenever the same input could give another signal (weights, processor, library versions)."""
        ...

    def prepare(self, images: Sequence[Image], texts: Sequence[str]) -> Mapping[str, Any]:
        """Preprocess `b` pairs with the teacher's own processor and tokenizer; returns CPU tensors."""
        ...

    def signal(self, inputs: Mapping[str, Any], request: Request) -> Signal:
        """Run the teacher without gradient on prepared inputs and return at least the requested fields."""
        ...

    def to(self, device: Any) -> Any:
        """Move the teacher to a device and return it."""
        ...
