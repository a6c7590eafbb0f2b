"""What one streamed sample holds: a picture, and the texts about it in any of the usual forms."""

import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cached_property
from hashlib import sha256
from typing import Any

from PIL import Image

from cvlm.data.importers.records import IMAGE_SUFFIXES, clean_text, text_at
from cvlm.data.pixels import check, decode
from cvlm.data.tar_stream import RawSample
from cvlm.errors import CvlmError

_TEXT_KEYS = ("text", "question", "caption")


@dataclass(frozen=True)
class StreamPicture:
    """A picture that came by; decoded once, however many look at it."""

    name: str
    data: bytes = field(repr=False)

    @cached_property
    def key(self) -> str:
        """SHA-256 of the bytes."""
        return sha256(self.data).hexdigest()

    @cached_property
    def _image(self) -> Image.Image:
        return decode(self.data, self.name)

    def load(self) -> Image.Image:
        """Decode to RGB.

        Raises:
            CvlmError: it cannot be decoded.
        """
        return self._image

    def check(self) -> None:
        """Read to the end without keeping anything.

        Raises:
            CvlmError: as `load` does.
        """
        check(self.data, self.name)


@dataclass(frozen=True, kw_only=True)
class StreamPair:
    """A picture with one text about it, and what people answered; empty where that is not known."""

    picture: StreamPicture
    text: str
    answers: tuple[str, ...]


def pairs_of(sample: RawSample) -> list[StreamPair]:
    """Return the pairs of a sample; its picture is not looked at.

    Raises:
        CvlmError: it is broken.
    """
    if sample.problem is not None:
        raise CvlmError(sample.problem)
    shown = [data for suffix, data in sample.members.items() if f".{suffix.rpartition('.')[2]}" in IMAGE_SUFFIXES]
    if len(shown) != 1:
        raise CvlmError(f"{len(shown)} pictures; a streamed sample has one")
    picture = StreamPicture(sample.name, shown[0])
    texts = _texts(sample.members)
    if not texts:
        raise CvlmError("no text; a json with 'texts', 'question' or 'caption' is read, or a txt")
    return [StreamPair(picture=picture, text=text, answers=answers) for text, answers in texts]


def _texts(members: Mapping[str, bytes]) -> list[tuple[str, tuple[str, ...]]]:
    """Return texts and answers: of the json in our own form or with one question or caption, else of the txt.

    Raises:
        CvlmError: the json or a text is damaged.
    """
    rows = _rows(members["json"]) if "json" in members else []
    if rows:
        return [(text_at(row, key), _answers(row)) for row, key in rows]
    if "txt" not in members:
        return []
    try:
        caption = members["txt"].decode()
    except UnicodeDecodeError as error:
        raise CvlmError(f"the caption is not UTF-8 text: {error}") from error
    return [(clean_text(caption, "caption"), ())] if caption.strip() else []


def _rows(content: bytes) -> list[tuple[Any, str]]:
    """Return what a json says about its picture, each with the key that its text stands under."""
    try:
        value = json.loads(content)
    except (ValueError, RecursionError) as error:
        raise CvlmError(f"not valid JSON: {error}") from error
    if not isinstance(value, dict):
        raise CvlmError("the json holds no object")
    if isinstance(value.get("texts"), list):
        return [(row, "text") for row in value["texts"]]
    return [(value, key) for key in _TEXT_KEYS if key in value][:1]


def _answers(row: dict[str, Any]) -> tuple[str, ...]:
    """Return people's answers, as texts or as in VQA v2's own files, or the one answer; none if there is none."""
    given = row.get("answers", [row["answer"]] if "answer" in row else [])
    if not isinstance(given, list):
        raise CvlmError(f"'answers' must be a list, got {given!r:.80}")
    return tuple(text_at(one if isinstance(one, dict) else {"answer": one}, "answer") for one in given)
