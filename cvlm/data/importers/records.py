"""What every importer returns, and the careful reading that all of them share."""

import json
import math
import os
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from hashlib import sha256
from io import FileIO
from pathlib import Path
from typing import Any, Protocol, TypeVar

from cvlm.data.pixels import MAX_FILE_BYTES, safe_name
from cvlm.data.shard_index import DataTask, Rule, SourceFile
from cvlm.errors import CvlmError, listed

MAX_TEXT = 10_000
"""Characters; a longer question, caption or answer is taken for damage."""

HUB = "hf:"
"""What a source begins with that is a name on the Hugging Face hub, not a path."""

IMAGE_SUFFIXES = frozenset({".jpg", ".jpeg", ".png", ".webp", ".gif", ".bmp"})


T = TypeVar("T")


class ImageSource(Protocol):
    """Where an import gets a picture's bytes from; must survive pickling."""

    def read(self) -> bytes:
        """Return the bytes of a picture file."""
        ...

    def stamp(self) -> str:
        """Return what changes when the picture is changed; empty where the source's files tell already."""
        ...


@dataclass(frozen=True, slots=True)
class ImageFile:
    """A picture file."""

    path: Path

    def read(self) -> bytes:
        """Read the file.

        Raises:
            CvlmError: it is missing, no file, or larger than `MAX_FILE_BYTES`.
        """
        try:
            with FileIO(self.path) as file:
                if os.fstat(file.fileno()).st_size > MAX_FILE_BYTES:
                    raise CvlmError(f"the image {self.path} has more than {MAX_FILE_BYTES:,} bytes, which is refused")
                return file.readall()
        except OSError as error:
            raise CvlmError(f"cannot read the image {self.path}: {error.strerror}") from error

    def stamp(self) -> str:
        """Return size in bytes and time of the last change in nanoseconds; empty if the file is gone."""
        try:
            facts = os.stat(self.path)
        except OSError:
            return ""
        return f"{facts.st_size} {facts.st_mtime_ns}"


@dataclass(frozen=True, slots=True, kw_only=True)
class Text:
    """One question, statement or caption about a picture.

    Attributes:
        id: as in the source; unique in its split.
        text: the question, statement or caption.
        answers: what people answered, ten in VQA v2; one where there is one truth; empty where it is not known.
        answer: the one that counts for the vocabulary; None without answers.
        type: question type, such as `how many`.
        answer_type: such as `yes/no`, `number`, `other`.
    """

    id: str
    text: str
    answers: tuple[str, ...] = ()
    answer: str | None = None
    type: str = ""
    answer_type: str = ""

    def to_json(self) -> dict[str, Any]:
        """Return the fields that say something."""
        values = {name: getattr(self, name) for name in ("id", "text", "answers", "answer", "type", "answer_type")}
        return {name: value for name, value in values.items() if value}


@dataclass(frozen=True, slots=True, kw_only=True)
class Sample:
    """A picture (or two, for tasks over pairs) and everything that is said about it.

    Attributes:
        id: of the picture, unique in its split; becomes the key of the sample.
        split: `train`, `val`, `test`, ...
        images: one or two.
        texts: at least one.
    """

    id: str
    split: str
    images: tuple[ImageSource, ...]
    texts: tuple[Text, ...]


@dataclass(frozen=True, kw_only=True)
class Source:
    """A data set, read.

    Attributes:
        name: of the data set.
        task: see `FolderIndex`.
        rule: see `FolderIndex`.
        evaluate: split that scores are reported on.
        samples: in a fixed order, splits together.
        files: what was read besides pictures, with checksums.
        licence: as the source states it.
        rows: how many questions or captions the source lists, bad ones included.
        skipped: (row, reason) of those that were left out.
        answers: a vocabulary that the data set fixes; None builds one from the training answers.
    """

    name: str
    task: DataTask
    rule: Rule
    evaluate: str
    samples: list[Sample]
    files: tuple[SourceFile, ...]
    licence: str | None = None
    rows: int
    skipped: tuple[tuple[str, str], ...] = ()
    answers: tuple[str, ...] | None = None

    def check_budget(self, share: float) -> None:
        """Refuse a source of which more than `share` of all rows is bad."""
        check_budget("row", [f"{row}: {reason}" for row, reason in self.skipped], self.rows, share)


@dataclass(frozen=True, kw_only=True)
class ImportOptions:
    """What a user may say about an import.

    Attributes:
        skip: share of rows, and of pictures, that may be bad before the import is refused.
        images: folder of the pictures, where it is not the usual one.
        columns: field -> column, for tables.
    """

    skip: float = 0.01
    images: Path | None = None
    columns: Mapping[str, str] = field(default_factory=dict)


class Skips:
    """Counts bad rows; `Source.check_budget` decides whether they are too many."""

    def __init__(self) -> None:
        self.found: list[tuple[str, str]] = []

    def keep(self, row: str, make: Callable[..., T], *given: Any) -> T | None:
        """Return what `make(*given)` returns, or None and a note if it raises `CvlmError`."""
        try:
            return make(*given)
        except CvlmError as error:
            self.found.append((row, str(error)))
            return None


def check_budget(what: str, problems: list[str], total: int, share: float) -> None:
    """Refuse more than `share` of `total` problems, naming the first five.

    Raises:
        CvlmError: there are too many.
    """
    allowed = math.floor(share * total)
    if len(problems) > allowed:
        raise CvlmError(
            f"{len(problems)} of {total} {what}s are damaged, {allowed} may be ({share:.2%}). Correct the source, or "
            f"raise --skip to leave them out.{listed(problems)}"
        )


def read_json(path: Path) -> tuple[Any, SourceFile]:
    """Read a JSON file; returns its value and its checksum.

    Raises:
        CvlmError: the file cannot be read, or is no JSON.
    """
    content, entry = read_file(path)
    try:
        return json.loads(content), entry
    except UnicodeDecodeError as error:
        raise CvlmError(f"{path} is not UTF-8 text: {error}") from error
    except (ValueError, RecursionError) as error:
        raise CvlmError(f"{path} is not valid JSON: {error}") from error


def read_file(path: Path) -> tuple[bytes, SourceFile]:
    """Read a file; returns its bytes and its checksum.

    Raises:
        CvlmError: the file cannot be read.
    """
    try:
        content = path.read_bytes()
    except OSError as error:
        raise CvlmError(f"cannot read {path}: {error.strerror}") from error
    return content, SourceFile(name=path.name, bytes=len(content), sha256=sha256(content).hexdigest())


def list_at(value: Any, key: str, path: Path) -> list[Any]:
    """Return `value[key]`, which must be a list that is not empty.

    Raises:
        CvlmError: it is not.
    """
    found = value.get(key) if isinstance(value, dict) else None
    if not isinstance(found, list) or not found:
        raise CvlmError(f"{path} has no list {key!r}, or an empty one; is it a file of this format?")
    return found


def text_at(row: Any, key: str) -> str:
    """Return `row[key]`, which must be a text that is not blank; ends are stripped.

    Raises:
        CvlmError: it is not, or it is too long, or no valid Unicode.
    """
    value = row.get(key) if isinstance(row, dict) else None
    if not isinstance(value, str) or not value.strip():
        raise CvlmError(f"{key!r} must be a text that is not empty, got {value!r:.80}")
    return clean_text(value, key)


def clean_text(value: str, key: str) -> str:
    """Return a text without blank ends.

    Raises:
        CvlmError: it is longer than `MAX_TEXT`, or holds half a surrogate pair.
    """
    if len(value) > MAX_TEXT:
        raise CvlmError(f"{key!r} has {len(value):,} characters, more than {MAX_TEXT:,}")
    try:
        value.encode("utf-8")
    except UnicodeEncodeError as error:
        raise CvlmError(f"{key!r} is not valid Unicode: {error.reason}") from error
    return value.strip()


def id_at(row: Any, key: str) -> str:
    """Return `row[key]`, a whole number or a short text, as a text.

    Raises:
        CvlmError: it is neither.
    """
    value = row.get(key) if isinstance(row, dict) else None
    if isinstance(value, int) and not isinstance(value, bool) and 0 <= value < 2**63:
        return str(value)
    if isinstance(value, str) and 0 < len(value) <= 200 and value.strip():
        return clean_text(value, key)
    raise CvlmError(f"{key!r} must be a whole number or a short text, got {value!r:.80}")


Row = tuple[str, str, tuple[ImageSource, ...], Text]
"""What an importer makes of one question or caption: split, picture id, pictures, text."""


def group(samples: Iterable[Row]) -> list[Sample]:
    """Collect rows (split, picture id, pictures, text) into one sample per picture, in order of first use."""
    found: dict[tuple[str, str], tuple[tuple[ImageSource, ...], list[Text]]] = {}
    for split, image_id, images, text in samples:
        found.setdefault((split, image_id), (images, []))[1].append(text)
    return [
        Sample(id=image_id, split=split, images=images, texts=tuple(texts))
        for (split, image_id), (images, texts) in found.items()
    ]


def find_image(folders: Iterable[Path], name: str) -> ImageFile:
    """Return the first of the folders' files of this name.

    Raises:
        CvlmError: the name leaves its folder, or no folder has it.
    """
    name = safe_name(name)
    folders = list(folders)
    for folder in folders:
        # A data set can have a million pictures: building a Path costs more than looking for its file.
        if os.path.isfile(f"{folder}/{name}"):
            return ImageFile(folder / name)
    raise CvlmError(f"the image {name!r} is in none of {', '.join(map(str, folders))}")
