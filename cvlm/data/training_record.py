"""`training_data.json` beside a trained model: which pictures and texts it, and its teacher, were trained on.

Pictures stand there as the first 16 digits of their file's SHA-256 and as perceptual hashes; texts as 16 digits of a
SHA-256 over id and wording, because ids alone (`0`, `1`, ...) mean nothing across data sets. So the file gives away
neither pictures nor texts, and says whether a split holds one that was trained on.
"""

import json
from collections.abc import Callable, Sequence
from hashlib import sha256
from pathlib import Path
from typing import Annotated, Literal

from pydantic import Field, NonNegativeInt, StringConstraints, ValidationError

from cvlm.config import Strict
from cvlm.data.examples import Examples, Picture
from cvlm.data.pixels import perceptual_hash
from cvlm.errors import CvlmError
from cvlm.files import write_atomic

TRAINING_DATA = "training_data.json"
SCHEMA: Literal["cvlm-training-data/1"] = "cvlm-training-data/1"
DIGITS = 16

Digest = Annotated[str, StringConstraints(pattern="^[0-9a-f]{16}$")]
Progress = Callable[[int, int], None]


class DataSource(Strict):
    """One split that something was trained on.

    Attributes:
        data: name of the data set.
        split: of it.
        fingerprint: of the split, see `Examples.fingerprint`.
        used_by: phases that saw it, the teacher's included.
        pairs: how many image-text pairs it has.
        pictures: digests of the picture files.
        texts: digests of ids with their wording; empty where the source has no ids.
        looks: perceptual hashes of the pictures.
    """

    data: str
    split: str
    fingerprint: str
    used_by: tuple[str, ...]
    pairs: NonNegativeInt
    pictures: tuple[Digest, ...]
    texts: tuple[Digest, ...]
    looks: tuple[Digest, ...]


class TrainingRecord(Strict):
    """Everything that a model was trained on, as far as it is known; pretraining of its encoders is not.

    Attributes:
        checkpoint: which step's weights the model has, and what that choice looked at.
        sources: the splits.
        unknown: teachers without a record of their own.
    """

    schema_: Literal["cvlm-training-data/1"] = Field(default=SCHEMA, alias="schema")
    checkpoint: str
    sources: tuple[DataSource, ...]
    unknown: tuple[str, ...] = ()


def picture_digests(picture: Picture) -> tuple[str, ...]:
    """Return the digest of a picture's file; of two pictures in one, both."""
    return tuple(file_digest(key) for key in picture.key.split("+"))


def file_digest(key: str) -> str:
    """Shorten a SHA-256; a key that is none (of a picture without a file) is hashed first."""
    is_hash = len(key) == 64 and set(key) <= set("0123456789abcdef")
    return (key if is_hash else sha256(key.encode()).hexdigest())[:DIGITS]


def text_digest(identity: str, text: str) -> str:
    """Return the digest of a question or caption: its id together with its wording."""
    return sha256(json.dumps([identity, text]).encode()).hexdigest()[:DIGITS]


def text_digests(examples: Examples) -> list[str]:
    """Return the digest of each pair's text `[n]`; empty where the source has no ids."""
    return [
        text_digest(identity, examples.texts[text])
        for identity, text in zip(examples.ids, examples.text_of, strict=False)
    ]


def look_of(picture: Picture) -> str:
    """Return the perceptual hash as 16 hexadecimal digits."""
    return f"{perceptual_hash(picture.load()):0{DIGITS}x}"


def source_of(examples: Examples, progress: Progress | None = None) -> DataSource:
    """Describe a split; every picture is decoded once for its perceptual hash."""
    looks = set()
    for done, picture in enumerate(examples.pictures, start=1):
        looks.add(look_of(picture))
        if progress is not None:
            progress(done, len(examples.pictures))
    return DataSource(
        data=examples.name,
        split=examples.split,
        fingerprint=examples.fingerprint,
        used_by=(),
        pairs=len(examples),
        pictures=tuple(sorted({digest for picture in examples.pictures for digest in picture_digests(picture)})),
        texts=tuple(sorted(set(text_digests(examples)))),
        looks=tuple(sorted(looks)),
    )


def merge_sources(sources: Sequence[DataSource]) -> tuple[DataSource, ...]:
    """List every split once, with all phases that used it."""
    merged: dict[tuple[str, str], DataSource] = {}
    for source in sources:
        place = (source.fingerprint, source.split)
        used = merged[place].used_by if place in merged else ()
        merged[place] = source.model_copy(update={"used_by": tuple(dict.fromkeys([*used, *source.used_by]))})
    return tuple(merged.values())


def write_record(folder: Path, record: TrainingRecord) -> None:
    """Write `training_data.json` into a model's folder."""
    write_atomic(folder / TRAINING_DATA, json.dumps(record.model_dump(mode="json", by_alias=True)).encode())


def read_record(path: Path) -> TrainingRecord | None:
    """Read the record of a model folder, or the file itself; None if there is none.

    Raises:
        CvlmError: the file is damaged.
    """
    file = path / TRAINING_DATA if path.is_dir() else path
    if not file.is_file():
        return None
    try:
        return TrainingRecord.model_validate_json(file.read_bytes())
    except (OSError, ValidationError) as error:
        first = str(error).replace("\n", " ")[:200]
        raise CvlmError(
            f"{file} is no record of training data, or damaged: {first}; delete it or train again"
        ) from error
