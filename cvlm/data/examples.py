"""One split of a task's data: pictures, distinct texts, and the pairs between them."""

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from hashlib import sha256
from json import dumps
from pathlib import Path
from typing import Protocol

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from cvlm.data.answers import UNLABELLED, SoftLabels
from cvlm.encoders.pictures import to_rgb
from cvlm.errors import CvlmError


class Picture(Protocol):
    """Something that can be decoded to an RGB picture; `key` changes when its content does."""

    @property
    def key(self) -> str:
        """A short text that identifies the content."""
        ...

    def load(self) -> Image.Image:
        """Decode the picture."""
        ...


@dataclass(frozen=True)
class PictureFile:
    """A picture file on disk."""

    path: Path

    @cached_property
    def key(self) -> str:
        """SHA-256 of the file, read once."""
        try:
            return sha256(self.path.read_bytes()).hexdigest()
        except OSError as error:
            raise CvlmError(f"cannot read the image {self.path}: {error.strerror}") from error

    def load(self) -> Image.Image:
        """Decode the file to RGB; what is transparent becomes white.

        Raises:
            CvlmError: the file is missing, truncated, or no picture.
        """
        try:
            with Image.open(self.path) as image:
                return to_rgb(image)
        except (OSError, ValueError, SyntaxError, Image.DecompressionBombError) as error:
            raise CvlmError(
                f"cannot decode the image {self.path}: {error}. Replace the file, or take its lines out of the data."
            ) from error


@dataclass(frozen=True, kw_only=True)
class Examples:
    """Image-text pairs of one split.

    Attributes:
        name: the data set, for messages and reports.
        split: `train` or `test`.
        pictures: distinct pictures.
        texts: distinct texts.
        image_of: `[n]` picture index of each pair; `[n, 2]` for tasks over two pictures.
        text_of: `[n]` text index of each pair.
        labels: `[n]` answer index (vqa) or picture group (retrieval), `UNLABELLED` where it is hidden; or for vqa soft
            scores, whose rows are `[n_answers]`.
        answers: the answer vocabulary, for vqa.
        references: what people answered to each pair's question, for the official VQA accuracy; empty where the label
            is the only truth.
        types: question type of each pair, for breakdowns; may be empty.
        ids: each pair's question or caption id in its source; may be empty.
    """

    name: str
    split: str
    pictures: Sequence[Picture]
    texts: tuple[str, ...]
    image_of: NDArray[np.int64]
    text_of: NDArray[np.int64]
    labels: NDArray[np.int64] | SoftLabels
    answers: tuple[str, ...] = field(default=())
    references: tuple[tuple[str, ...], ...] = field(default=())
    types: tuple[str, ...] = field(default=())
    ids: tuple[str, ...] = field(default=())

    def __post_init__(self) -> None:
        if not len(self):
            raise CvlmError(f"the {self.split} split of {self.name} is empty")
        for name in ("references", "types", "ids"):
            given = len(getattr(self, name))
            if given not in (0, len(self)):
                raise ValueError(f"{name} has {given} entries for {len(self)} pairs")

    def __len__(self) -> int:
        return len(self.image_of)

    @property
    def unit_of(self) -> NDArray[np.int64]:
        """What the bootstrap resamples, `[n]`: the picture, or over two pictures the statement."""
        return self.image_of if self.image_of.ndim == 1 else self.text_of

    @property
    def labelled(self) -> NDArray[np.int64]:
        """Indices of the pairs that have a label."""
        known = self.labels.known if isinstance(self.labels, SoftLabels) else self.labels >= 0
        return np.flatnonzero(known)

    def hide_labels(self, share: float, seed: int) -> "Examples":
        """Keep a random share of the labels (at least one); a larger share of the same seed keeps those and more."""
        if share >= 1:
            return self
        number = max(1, round(share * len(self.labelled)))
        kept = np.random.default_rng([seed, 0x1ABE1]).permutation(self.labelled)[:number]
        if isinstance(self.labels, SoftLabels):
            return replace(self, labels=self.labels.hide_all_but(kept))
        labels = np.full_like(self.labels, UNLABELLED)
        labels[kept] = self.labels[kept]
        return replace(self, labels=labels)

    def limit(self, number: int | None) -> "Examples":
        """Keep the first `number` pairs, and the pictures and texts that they need."""
        if number is None or number >= len(self):
            return self
        pictures, image_of = np.unique(self.image_of[:number], return_inverse=True)
        image_of = image_of.reshape(self.image_of[:number].shape)
        texts, text_of = np.unique(self.text_of[:number], return_inverse=True)
        return replace(
            self,
            pictures=[self.pictures[i] for i in pictures],
            texts=tuple(self.texts[i] for i in texts),
            image_of=image_of,
            text_of=text_of,
            labels=self.labels.first(number) if isinstance(self.labels, SoftLabels) else self.labels[:number],
            references=self.references[:number],
            types=self.types[:number],
            ids=self.ids[:number],
        )

    @cached_property
    def fingerprint(self) -> str:
        """SHA-256 over pictures, texts, pairs and answers; labels are left out, they never enter a stored target."""
        digest = sha256()
        # JSON keeps the lists apart: a text never runs into the next one, nor into the answers.
        digest.update(dumps([[picture.key for picture in self.pictures], self.texts, self.answers]).encode())
        digest.update(self.image_of.tobytes() + self.text_of.tobytes())
        return digest.hexdigest()


@dataclass(frozen=True, kw_only=True)
class Splits:
    """The two splits of a data set."""

    train: Examples
    test: Examples


def index_texts(texts: Sequence[str]) -> tuple[tuple[str, ...], NDArray[np.int64]]:
    """Return the distinct texts in order of first use, and the index of each given text among them."""
    position: dict[str, int] = {}
    index = [position.setdefault(text, len(position)) for text in texts]
    return tuple(position), np.array(index, dtype=np.int64)
