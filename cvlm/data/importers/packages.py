"""Data that PyPI packages hold: easy-VQA and OpenMoji, as the recipes' data kinds of the same names read them."""

import io
from dataclasses import dataclass
from hashlib import sha256
from pathlib import Path

from cvlm.config import EasyVqaData, OpenMojiData
from cvlm.data import easy_vqa, openmoji
from cvlm.data.examples import Examples, Picture, PictureFile, Splits
from cvlm.data.importers.records import ImageFile, ImageSource, ImportOptions, Source, Text, group
from cvlm.data.shard_index import SourceFile


@dataclass(frozen=True, slots=True)
class DrawnImage:
    """A picture that exists only in memory; stored as PNG."""

    picture: Picture

    def read(self) -> bytes:
        """Draw it."""
        buffer = io.BytesIO()
        self.picture.load().save(buffer, "PNG")
        return buffer.getvalue()

    def stamp(self) -> str:
        """Return nothing: the package's own files are hashed."""
        return ""


def read_easy_vqa(path: Path, options: ImportOptions) -> Source:
    """Read the installed package; the source folder is not looked at.

    Raises:
        CvlmError: the package is not installed.
    """
    splits = easy_vqa.load(EasyVqaData(kind="easy_vqa"))
    return _source("easy-VQA", splits, "MIT")


def read_openmoji(path: Path, options: ImportOptions) -> Source:
    """Read the installed packages; the source folder is not looked at.

    Raises:
        CvlmError: a package is not installed.
    """
    splits = openmoji.load(OpenMojiData(kind="openmoji", size=128))
    return _source("OpenMoji", splits, "CC BY-SA 4.0")


def _source(name: str, splits: Splits, licence: str) -> Source:
    halves = {"train": splits.train, "test": splits.test}
    rows = [(split, *row) for split, examples in halves.items() for row in _rows(examples)]
    answers = splits.train.answers
    digest = sha256("".join(examples.fingerprint for examples in halves.values()).encode()).hexdigest()
    return Source(
        name=name,
        task="vqa" if answers else "retrieval",
        rule="exact" if answers else "none",
        evaluate="test",
        samples=group(rows),
        files=(SourceFile(name=f"package {name}", bytes=0, sha256=digest),),
        licence=licence,
        rows=len(rows),
        answers=answers or None,
    )


def _rows(examples: Examples) -> list[tuple[str, tuple[ImageSource, ...], Text]]:
    rows: list[tuple[str, tuple[ImageSource, ...], Text]] = []
    for position, (image, text) in enumerate(zip(examples.image_of, examples.text_of, strict=True)):
        picture = examples.pictures[image]
        source: ImageSource = ImageFile(picture.path) if isinstance(picture, PictureFile) else DrawnImage(picture)
        # Without an answer vocabulary the labels are groups of pictures.
        answer = examples.answers[int(examples.labels[position])] if examples.answers else None
        said = Text(
            id=str(position),
            text=examples.texts[text],
            answers=(answer,) if answer is not None else (),
            answer=answer,
        )
        rows.append((f"{examples.split}-{image}", (source,), said))
    return rows
