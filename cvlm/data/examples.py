"""One split of a task's data: pictures, distinct texts, and the pairs between them."""

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from hashlib import sha256
from json import dumps
from pathlib import Path
from typing import TYPE_CHECKING, Protocol

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from cvlm.data.answers import UNLABELLED, SoftLabels
from cvlm.data.words import CaptionWords
from cvlm.encoders.pictures import to_rgb
from cvlm.errors import CvlmError

if TYPE_CHECKING:
    from cvlm.data.streaming import Stream


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
        image_of: `[n]` picture index of each pair; `[n, 2]` for tasks over two pictures, `[n, 0]` for texts alone.
        text_of: `[n]` text index of each pair.
        labels: `[n]` answer index (vqa) or picture group (retrieval), `UNLABELLED` where it is hidden; for vqa also
            soft scores, whose rows are `[n_answers]`; for captioning the words of the captions.
        answers: the vocabulary: of answers, or of words.
        references: what people answered to each pair's question, for the official VQA accuracy; empty where the label
            is the only truth.
        truths: the one right answer of each pair as its source spells it, also outside the vocabulary; empty where
            people answered or the label says it.
        types: question type of each pair, for breakdowns; may be empty.
        answer_types: type of each pair's answer, likewise.
        ids: each pair's question or caption id in its source; may be empty.
        skipped: samples of the split that were broken and are left out, one sentence each.
    """

    name: str
    split: str
    pictures: Sequence[Picture]
    texts: tuple[str, ...]
    image_of: NDArray[np.int64]
    text_of: NDArray[np.int64]
    labels: NDArray[np.int64] | SoftLabels | CaptionWords
    answers: tuple[str, ...] = field(default=())
    references: tuple[tuple[str, ...], ...] = field(default=())
    truths: tuple[str, ...] = field(default=())
    types: tuple[str, ...] = field(default=())
    answer_types: tuple[str, ...] = field(default=())
    ids: tuple[str, ...] = field(default=())
    skipped: tuple[str, ...] = field(default=())

    def __post_init__(self) -> None:
        if not len(self):
            raise CvlmError(f"the {self.split} split of {self.name} is empty")
        for name in ("references", "truths", "types", "answer_types", "ids"):
            given = len(getattr(self, name))
            if given not in (0, len(self)):
                raise ValueError(f"{name} has {given} entries for {len(self)} pairs")

    def __len__(self) -> int:
        return len(self.image_of)

    @property
    def unit_of(self) -> NDArray[np.int64]:
        """What the bootstrap resamples, `[n]`: the picture; the text over two pictures or none."""
        return self.image_of if self.image_of.ndim == 1 else self.text_of

    @property
    def labelled(self) -> NDArray[np.int64]:
        """Indices of the pairs that have a label."""
        known = self.labels >= 0 if isinstance(self.labels, np.ndarray) else self.labels.known
        return np.flatnonzero(known)

    def hide_labels(self, share: float, seed: int) -> "Examples":
        """Keep a random share of the labels (at least one); a larger share of the same seed keeps those and more."""
        if share >= 1:
            return self
        number = max(1, round(share * len(self.labelled)))
        kept = np.random.default_rng([seed, 0x1ABE1]).permutation(self.labelled)[:number]
        if not isinstance(self.labels, np.ndarray):
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
            labels=self.labels[:number] if isinstance(self.labels, np.ndarray) else self.labels.first(number),
            references=self.references[:number],
            truths=self.truths[:number],
            types=self.types[:number],
            answer_types=self.answer_types[:number],
            ids=self.ids[:number],
        )

    @cached_property
    def fingerprint(self) -> str:
        """SHA-256 over pictures, texts, pairs and answers; labels are left out, they never enter a stored target.

        So is a vocabulary of words: it says how one captioner reads the texts.
        """
        digest = sha256()
        # JSON keeps the lists apart: a text never runs into the next one, nor into the answers.
        answers = () if isinstance(self.labels, CaptionWords) else self.answers
        digest.update(dumps([[picture.key for picture in self.pictures], self.texts, answers]).encode())
        digest.update(self.image_of.tobytes() + self.text_of.tobytes())
        return digest.hexdigest()


@dataclass(frozen=True, kw_only=True)
class Splits:
    """The two splits of a data set.

    Attributes:
        train: the training pairs; of a stream, the first of them.
        test: the pairs that are scored.
        stream: where all training pairs come from, if they are streamed.
    """

    train: Examples
    test: Examples
    stream: "Stream | None" = None


def index_texts(texts: Sequence[str]) -> tuple[tuple[str, ...], NDArray[np.int64]]:
    """Return the distinct texts in order of first use, and the index of each given text among them."""
    position: dict[str, int] = {}
    index = [position.setdefault(text, len(position)) for text in texts]
    return tuple(position), np.array(index, dtype=np.int64)
