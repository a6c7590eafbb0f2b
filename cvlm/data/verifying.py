"""Whether an import is sound: every checksum, every picture, no id twice, and how far its splits overlap.

The same comparison shows what a teacher has seen of each split, where somebody declares its training data.
"""

import re
import tarfile
from collections.abc import Iterator
from dataclasses import dataclass, field
from hashlib import sha256
from itertools import combinations
from pathlib import Path

from cvlm.data.pixels import perceptual_hash, safe_name
from cvlm.data.shard_index import INDEX, FolderIndex, ShardEntry, read_folder_index, read_shard_index
from cvlm.data.shards import ShardReader
from cvlm.data.training_record import file_digest, picture_digests, text_digest
from cvlm.errors import CvlmError
from cvlm.lineage import TRAINING_DATA, read_record
from cvlm.progress import Progress

TEACHER = "teacher"
_SHA256 = re.compile("[0-9a-f]{64}")

NEAR = 3
"""Bits of 64 in which the hashes of two copies of one picture may differ."""


@dataclass(frozen=True, kw_only=True)
class Overlap:
    """What two splits share, or a teacher's training data and a split.

    Attributes:
        splits: the two; a teacher's data is called `TEACHER`.
        ids: picture ids that stand in both.
        texts: questions or captions that stand in both under the same id.
        files: pictures of the second whose very bytes stand in the first.
        looks: pictures of the second whose perceptual hash differs from one in the first by at most `NEAR` bits, equal
            bytes included. Very simple pictures can be that near without being copies: look before judging.
        examples: (key in the first, key in the second) of pictures that look alike, at most five.
    """

    splits: tuple[str, str]
    ids: int
    texts: int
    files: int
    looks: int
    examples: tuple[tuple[str, str], ...]


@dataclass(kw_only=True)
class Verdict:
    """What was found.

    Attributes:
        samples: number of samples that were read.
        problems: what is wrong; an import without any is sound.
        overlaps: one per pair of splits.
        taught: one per split, with the teacher's data; empty where none was declared.
    """

    samples: int = 0
    problems: list[str] = field(default_factory=list)
    overlaps: list[Overlap] = field(default_factory=list)
    taught: list[Overlap] = field(default_factory=list)


@dataclass(kw_only=True)
class _Seen:
    """Of one split: picture ids, file digest -> key, perceptual hash -> keys, question ids, and their digests."""

    ids: set[str] = field(default_factory=set)
    files: dict[str, str] = field(default_factory=dict)
    hashes: dict[int, list[str]] = field(default_factory=dict)
    text_ids: set[str] = field(default_factory=set)
    texts: set[str] = field(default_factory=set)


def verify(folder: Path, progress: Progress | None = None, teacher_data: Path | None = None) -> Verdict:
    """Read everything once.

    Args:
        folder: the import.
        progress: called with (done, total) samples.
        teacher_data: what a teacher was trained on, see `read_declared`.

    Raises:
        CvlmError: the folder's index itself is missing or was changed, or the teacher's data cannot be read.
    """
    index = read_folder_index(folder)
    declared = read_declared(teacher_data) if teacher_data is not None else None
    total = sum(entry.samples for entries in index.splits.values() for entry in entries)
    verdict = Verdict()
    seen: dict[str, _Seen] = {}
    for split, entries in index.splits.items():
        for entry in entries:
            verdict.problems += _check_archive(folder, entry)
        seen[split] = _Seen()
        for _ in _check_samples(folder, index, split, seen[split], verdict):
            verdict.samples += 1
            if progress is not None:
                progress(verdict.samples, total)
    verdict.overlaps = [_overlap((a, b), seen[a], seen[b]) for a, b in combinations(index.splits, 2)]
    if declared is not None:
        verdict.taught = [_overlap((TEACHER, split), declared, seen[split]) for split in index.splits]
    return verdict


def read_declared(path: Path) -> _Seen:
    """Read what a teacher was trained on.

    Args:
        path: another import, of which the split `train` counts (every split where there is none of that name); a
            `training_data.json` or the model folder with one; or a text file with one picture per line, by its id or
            by the SHA-256 of its file.

    Raises:
        CvlmError: there is nothing of the kind, or it is damaged.
    """
    if (path / INDEX).is_file():
        return _declared_import(path)
    if path.is_dir() or path.suffix == ".json":
        record = read_record(path)
        if record is None:
            raise CvlmError(f"{path} holds neither imported data nor {TRAINING_DATA}; give a teacher's training data")
        looks = {int(look, 16): [TEACHER] for source in record.sources for look in source.looks}
        files = {digest: TEACHER for source in record.sources for digest in source.pictures}
        texts = {digest for source in record.sources for digest in source.texts}
        return _Seen(files=files, hashes=looks, texts=texts)
    try:
        lines = [line.strip() for line in path.read_text(encoding="utf-8").splitlines()]
    except (OSError, UnicodeDecodeError) as error:
        raise CvlmError(f"cannot read the teacher's training data {path}: {error}") from error
    hashes = {line for line in lines if _SHA256.fullmatch(line)}
    return _Seen(ids=set(lines) - hashes - {""}, files={file_digest(line): TEACHER for line in hashes})


def _declared_import(folder: Path) -> _Seen:
    index, seen, verdict = read_folder_index(folder), _Seen(), Verdict()
    for split in ("train",) if "train" in index.splits else index.splits:
        for _ in _check_samples(folder, index, split, seen, verdict):
            pass
    if verdict.problems:
        raise CvlmError(f"the teacher's training data {folder} is damaged: {verdict.problems[0]}")
    return seen


def _check_archive(folder: Path, entry: ShardEntry) -> list[str]:
    """Compare the file with its checksum, and its headers with its index: only plain files with safe names."""
    path = folder / entry.name
    try:
        with path.open("rb") as file:
            digest = sha256()
            while block := file.read(1 << 20):
                digest.update(block)
        if digest.hexdigest() != entry.sha256:
            return [f"{entry.name}: the checksum does not fit"]
        index = read_shard_index(folder, entry.name, entry.index_sha256)
        places = {f"{s.key}.{suffix}": place[:2] for s in index.samples for suffix, place in s.members.items()}
        with tarfile.open(path) as archive:
            found = {}
            for member in archive:
                if not member.isreg():
                    return [f"{entry.name}: {member.name!r} is a link or device, not a plain file"]
                found[safe_name(member.name)] = (member.offset_data, member.size)
        return [] if found == places else [f"{entry.name}: the tar headers do not fit the index"]
    except (CvlmError, OSError, tarfile.TarError) as error:
        return [f"{entry.name}: {error}"]


def _check_samples(folder: Path, index: FolderIndex, split: str, seen: _Seen, verdict: Verdict) -> Iterator[None]:
    try:
        reader = ShardReader(folder, split, index)
    except CvlmError as error:
        verdict.problems.append(str(error))
        return
    for position, sample in enumerate(reader.samples):
        try:
            record, picture = reader.record(position), reader.picture(position)
            looks = perceptual_hash(picture.load())
        except CvlmError as error:
            verdict.problems.append(str(error))
        else:
            if record["id"] in seen.ids:
                verdict.problems.append(f"{split}: the picture id {record['id']!r} stands twice")
            seen.ids.add(record["id"])
            for digest in picture_digests(picture):
                seen.files.setdefault(digest, sample.key)
            seen.hashes.setdefault(looks, []).append(sample.key)
            for text in record["texts"]:
                if text["id"] in seen.text_ids:
                    verdict.problems.append(f"{split}: the question or caption id {text['id']!r} stands twice")
                seen.text_ids.add(text["id"])
                seen.texts.add(text_digest(text["id"], text["text"]))
        yield


def _overlap(splits: tuple[str, str], first: _Seen, second: _Seen) -> Overlap:
    near = _find_near(list(first.hashes), list(second.hashes))
    alike = [(first.hashes[near[looks]][0], key) for looks in near for key in second.hashes[looks]]
    return Overlap(
        splits=splits,
        ids=len(first.ids & second.ids),
        texts=len(first.texts & second.texts),
        files=len(first.files.keys() & second.files.keys()),
        looks=len(alike),
        examples=tuple(alike[:5]),
    )


def _find_near(known: list[int], asked: list[int]) -> dict[int, int]:
    """Return, for every asked hash that is near a known one, the first such.

    Two hashes that differ in three bits agree in at least one of four bands of 16, so only those are compared.
    """
    bands: list[dict[int, list[int]]] = [{} for _ in range(NEAR + 1)]
    for value in known:
        for band, table in enumerate(bands):
            table.setdefault(value >> 16 * band & 0xFFFF, []).append(value)
    found = {}
    for value in asked:
        candidates = (c for band, table in enumerate(bands) for c in table.get(value >> 16 * band & 0xFFFF, ()))
        match = next((candidate for candidate in candidates if (candidate ^ value).bit_count() <= NEAR), None)
        if match is not None:
            found[value] = match
    return found
