"""The one interface that every teacher keeps, whatever it is inside."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol, cast, runtime_checkable

from PIL.Image import Image

from distill.errors import DistillError
from distill.signal import Request, Signal


@runtime_checkable
class Teacher(Protocol):
    """A source of targets. It owns its preprocessing and tokenizer, and is never trained by the student's trainer.

    The four properties may be plain attributes. A teacher that gives `logits` also says what they are over, in a
    further attribute `answers` (a tuple of strings in the order of the logits), if it knows. One of a task over
    several pictures says how many in an attribute `pictures`; `prepare` then gets so many pairs per example, next to
    each other.
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


@dataclass(frozen=True, kw_only=True)
class PairKey:
    """What a pair is called, for teachers that look targets up.

    Attributes:
        id: its id in the source of the data; None where the source has none.
        picture: key of its picture, for files the SHA-256 of the content; of two pictures both, joined by `+`.
        text: its text.
    """

    id: str | None = None
    picture: str
    text: str

    def __str__(self) -> str:
        return f"id {self.id}" if self.id is not None else f"picture {self.picture[:12]} with text {self.text!r}"


class KeyedTeacher(Teacher, Protocol):
    """A teacher that must be told which pairs it is asked about: its targets stand in a table."""

    @property
    def keyed(self) -> bool:
        """False where it need not be told after all: an ensemble without such a member."""
        ...

    def missing(self, keys: Sequence[PairKey]) -> list[int]:
        """Return the places of the pairs of a split that it knows nothing about; they are left out of training.

        Raises:
            DistillError: there are more of them than its settings allow; the text names some.
        """
        ...

    def look_up(self, keys: Sequence[PairKey], load: Callable[[], Sequence[Image]]) -> Mapping[str, Any]:
        """Prepare `b` pairs; in place of `prepare`.

        Args:
            keys: of the pairs.
            load: decodes the pictures, where they are needed; as many as `prepare` gets.
        """
        ...


def as_keyed(teacher: Teacher) -> KeyedTeacher | None:
    """Return the teacher, if it must be told which pairs it is asked about.

    One attribute says so. To compare with the whole protocol would read every property, `fingerprint` included.
    """
    return cast(KeyedTeacher, teacher) if getattr(teacher, "keyed", False) else None


def check_pairs(name: str, images: Sequence[Image], texts: Sequence[str]) -> None:
    """Refuse what are no pairs to prepare; `name` is the teacher's.

    Raises:
        DistillError: there are no pairs, or not as many pictures as texts.
    """
    if not images or len(images) != len(texts):
        raise DistillError(
            f"{name} needs as many pictures as texts, at least one pair; got {len(images)} and {len(texts)}"
        )
