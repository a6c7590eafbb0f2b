"""What stands beside the tar shards: one index per shard, and one for the folder that vouches for all of them.

`index.json` holds the SHA-256 of every shard and shard index (and of itself), a shard index the SHA-256 of every
member. So whatever changes after an import is noticed when it is read, not when a score comes out wrong.
"""

import json
from hashlib import sha256
from pathlib import Path
from typing import Annotated, Any, Literal, TypeVar

from pydantic import Field, NonNegativeInt, PositiveInt, StringConstraints, ValidationError

from cvlm.config import Strict
from cvlm.data.pixels import safe_name
from cvlm.errors import CvlmError
from cvlm.files import write_atomic

SCHEMA: Literal["cvlm-shards/1"] = "cvlm-shards/1"
INDEX = "index.json"
PLAN = ".import.json"
"""What an unfinished import was about; deleted when the import is complete."""

Sha256 = Annotated[str, StringConstraints(pattern="^[0-9a-f]{64}$")]
Member = tuple[NonNegativeInt, PositiveInt, Sha256]
"""Byte offset in the shard, size in bytes, SHA-256 of the bytes."""

DataTask = Literal["vqa", "retrieval", "nlvr2", "snli_ve"]
"""Tasks that data is imported for; others are made of these, see `cvlm.tasks`."""

Rule = Literal["vqa", "exact", "none"]
"""How answers are compared."""


class SampleIndex(Strict):
    """Where one sample stands in its shard: member suffix (`jpg`, `json`) -> place."""

    key: str
    members: dict[str, Member]

    @property
    def pictures(self) -> list[Member]:
        """The picture members in order: one, or the two of a pair task."""
        return [member for suffix, member in self.members.items() if suffix != "json"]


class Skipped(Strict):
    """A sample that was left out, and why."""

    key: str
    reason: str


class ShardEntry(Strict):
    """A shard as the folder's index knows it; `index_sha256` is of the shard's own index file."""

    name: str
    samples: NonNegativeInt
    texts: NonNegativeInt
    bytes: NonNegativeInt
    sha256: Sha256
    index_sha256: Sha256


class ShardIndex(Strict):
    """One shard.

    Attributes:
        name: file name of the shard.
        bytes: its size.
        sha256: of the whole file.
        texts: number of questions or captions in it.
        samples: in the order of the file.
        skipped: samples that should be here, and could not be imported.
    """

    name: str
    bytes: NonNegativeInt
    sha256: Sha256
    texts: NonNegativeInt
    samples: tuple[SampleIndex, ...]
    skipped: tuple[Skipped, ...] = ()

    def entry(self, index_sha256: str) -> ShardEntry:
        """Return what the folder's index says of this shard, given the SHA-256 of this index's file."""
        facts = {"name": self.name, "texts": self.texts, "bytes": self.bytes, "sha256": self.sha256}
        return ShardEntry.model_validate({**facts, "samples": len(self.samples), "index_sha256": index_sha256})


class SourceFile(Strict):
    """A file that an import read, relative to the source folder."""

    name: str
    bytes: NonNegativeInt
    sha256: Sha256


class Coverage(Strict):
    """What an answer vocabulary can reach of one split.

    Attributes:
        questions: all questions.
        answered: questions with at least one known answer.
        reachable: answered questions of which an answer is in the vocabulary.
        ceiling: mean over answered questions of the best soft score that an answer of the vocabulary earns.
    """

    questions: NonNegativeInt
    answered: NonNegativeInt
    reachable: NonNegativeInt
    ceiling: float = Field(ge=0, le=1)


class FolderIndex(Strict):
    """A whole import.

    Attributes:
        data_format: the importer, a key of `cvlm.data.importers.FORMATS`.
        task: `vqa` (questions or statements with answers) or `retrieval` (captions).
        rule: how answers are compared: `vqa` by the official VQA rule over several people's, `exact` with the one
            given, `none` for captions.
        evaluate: the split that scores are reported on by default.
        fingerprint: of source files, options and plan; an import is resumed only under the same.
    """

    schema_: Literal["cvlm-shards/1"] = Field(default=SCHEMA, alias="schema")
    name: str
    data_format: str
    task: DataTask
    rule: Rule
    evaluate: str
    licence: str | None
    sources: tuple[SourceFile, ...]
    options: dict[str, Any]
    fingerprint: Sha256
    splits: dict[str, tuple[ShardEntry, ...]]
    answers: tuple[str, ...] = ()
    min_count: NonNegativeInt = 0
    coverage: dict[str, Coverage] = Field(default_factory=dict)
    skipped: tuple[Skipped, ...] = ()


Record = TypeVar("Record", bound=Strict)


def write_json(path: Path, value: Any) -> str:
    """Write compact JSON atomically; returns the SHA-256 of the file."""
    content = json.dumps(value, ensure_ascii=False, separators=(",", ":")).encode()
    return write_bytes(path, content)


def write_bytes(path: Path, content: bytes) -> str:
    """Write a file atomically; returns its SHA-256."""
    write_atomic(path, content)
    return sha256(content).hexdigest()


def write_folder_index(folder: Path, index: FolderIndex) -> None:
    """Write `index.json`; it comes last and marks the import complete."""
    value = index.model_dump(mode="json", by_alias=True)
    content = {**value, "sha256": _own_hash(value)}
    write_bytes(folder / INDEX, (json.dumps(content, ensure_ascii=False, indent=1) + "\n").encode())


def read_folder_index(folder: Path) -> FolderIndex:
    """Read and check `index.json`.

    Raises:
        CvlmError: there is none, it is of another schema, or it was changed after the import.
    """
    path = folder / INDEX
    if not path.is_file():
        stopped = (folder / PLAN).exists()
        hint = "an import into it was stopped: give the same command again" if stopped else "see cvlm data import"
        raise CvlmError(f"{folder} holds no imported data, {INDEX} is missing; {hint}")
    value = _load(path)
    if value.get("schema") != SCHEMA:
        raise CvlmError(f"{path} has the schema {value.get('schema')!r}, this version reads {SCHEMA!r}; import again")
    stated = value.pop("sha256", None)
    if stated != _own_hash(value):
        raise CvlmError(f"{path} was changed after the import: its checksum does not fit. Import again.")
    index = _parse(FolderIndex, value, path)
    for entry in (entry for entries in index.splits.values() for entry in entries):
        _check_shard_name(entry.name, path)
    return index


def read_shard_index(folder: Path, name: str, expected: str | None = None) -> ShardIndex:
    """Read and check the index of the shard `name`.

    Args:
        folder: the data.
        name: the shard's file name.
        expected: SHA-256 that the index file must have; None takes any.

    Raises:
        CvlmError: it is missing, damaged, or points outside the shard.
    """
    path = folder / index_name(name)
    value = _load(path, expected)
    index = _parse(ShardIndex, value, path)
    for sample in index.samples:
        safe_name(sample.key)
        if "json" not in sample.members or not sample.pictures:
            raise CvlmError(f"{path}: the sample {sample.key!r} lacks its picture or its json. Import again.")
        for offset, size, _ in sample.members.values():
            if offset + size > index.bytes:
                raise CvlmError(f"{path}: the sample {sample.key!r} lies outside of {index.name}. Import again.")
    return index


def index_name(shard: str) -> str:
    """Return the file name of a shard's index."""
    return shard.removesuffix(".tar") + ".json"


def _check_shard_name(name: str, path: Path) -> None:
    if safe_name(name) != name or "/" in name or not name.endswith(".tar"):
        raise CvlmError(f"{path} names the shard {name!r}, which is no file of its folder. Import again.")


def _own_hash(value: Any) -> str:
    return sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()


def _load(path: Path, expected: str | None = None) -> dict[str, Any]:
    try:
        content = path.read_bytes()
    except OSError as error:
        raise CvlmError(f"cannot read {path}: {error.strerror}. Import again.") from error
    if expected is not None and sha256(content).hexdigest() != expected:
        raise CvlmError(f"{path} was changed after the import: its checksum does not fit {INDEX}. Import again.")
    try:
        value = json.loads(content)
    except (ValueError, RecursionError) as error:
        raise CvlmError(f"{path} is not JSON: {error}. Import again.") from error
    if not isinstance(value, dict):
        raise CvlmError(f"{path} holds no JSON object. Import again.")
    return value


def _parse(kind: type[Record], value: dict[str, Any], path: Path) -> Record:
    try:
        return kind.model_validate(value)
    except ValidationError as error:
        first = error.errors()[0]
        place = ".".join(map(str, first["loc"]))
        raise CvlmError(f"{path}: {place}: {first['msg']} ({error.error_count()} problem(s)). Import again.") from error
