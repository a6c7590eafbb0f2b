"""`training_data.json` beside a trained model: which pictures and texts it, and its teacher, were trained on.

Pictures stand there as the first 16 digits of their file's SHA-256 and as perceptual hashes; texts as 16 digits of a
SHA-256 over id and wording, because ids alone (`0`, `1`, ...) mean nothing across data sets. So the file gives away
neither pictures nor texts, and says whether a split holds one that was trained on.
"""

import json
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Annotated, Literal

from pydantic import Field, NonNegativeInt, StringConstraints, ValidationError

from cvlm.config import Strict
from cvlm.errors import CvlmError
from cvlm.files import write_atomic

TRAINING_DATA = "training_data.json"
SCHEMA: Literal["cvlm-training-data/1"] = "cvlm-training-data/1"

LAST_STEP = "last step of the phase; no selection on the scored split"
"""Which weights a phase leaves behind; every result of `cvlm bench` says so."""

Digest = Annotated[str, StringConstraints(pattern="^[0-9a-f]{16}$")]


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
        unknown: what it learned from without a record, such as most teachers.
    """

    schema_: Literal["cvlm-training-data/1"] = Field(default=SCHEMA, alias="schema")
    checkpoint: str
    sources: tuple[DataSource, ...]
    unknown: tuple[str, ...] = ()


UNTRAINED = TrainingRecord(checkpoint="composed, not trained", sources=())
"""Of a model that has learned nothing since its encoders met; it claims nothing, so it is neither saved nor shown."""


def inherit(
    own: DataSource, learned_from: Iterable[tuple[str, TrainingRecord | None]], beyond: Sequence[str] = ()
) -> TrainingRecord:
    """Describe what a model was trained on: its own split, and all that others passed on to it.

    Args:
        own: the split, with the phase that used it.
        learned_from: models that it began from or was taught by: what to call each, and its record, if it has one.
        beyond: what else it was trained on that no record holds.
    """
    sources, unknown = [own], list[str]()
    for name, record in learned_from:
        sources += record.sources if record is not None else ()
        unknown += record.unknown if record is not None else (f"{name}: no record of its training data",)
    unknown = list(dict.fromkeys([*unknown, *beyond]))
    return TrainingRecord(checkpoint=LAST_STEP, sources=merge_sources(sources), unknown=tuple(unknown))


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
