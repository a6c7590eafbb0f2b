"""Tar shards that webdataset reads as they are, and that an index makes random-access.

A sample is `KEY.jpg` and `KEY.json` side by side (two pictures: `KEY.0.jpg`, `KEY.1.jpg`): a picture is stored once,
the json holds every question or caption about it. A shard is written under a temporary name and renamed; its index
follows. Equal input gives equal bytes: no time, user or path enters a header.
"""

import json
import os
import re
import tarfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from hashlib import sha256
from pathlib import Path
from types import TracebackType
from typing import IO, Any, Self

from PIL import Image

from cvlm.data.pixels import check, decode
from cvlm.data.shard_index import (
    FolderIndex,
    Member,
    SampleIndex,
    ShardEntry,
    ShardIndex,
    Skipped,
    index_name,
    read_folder_index,
    read_shard_index,
)
from cvlm.errors import CvlmError

MAX_KEY = 80
_BLOCK = 512
_KEY = re.compile(r"[A-Za-z0-9_\-]{1,80}")


def make_key(name: str) -> str:
    """Return a sample key for a name: webdataset ends a key at the first dot, tar names have room for 100 bytes.

    A name that has to be changed gets eight digits of its SHA-256 behind it, so that two never meet.
    """
    if _KEY.fullmatch(name):
        return name
    digest = sha256(name.encode("utf-8", "surrogatepass")).hexdigest()[:8]
    return f"{re.sub(r'[^A-Za-z0-9_-]+', '_', name).strip('_')[: MAX_KEY - 9]}-{digest}"


class ShardWriter:
    """Writes one shard and its index; used as a context manager. After an error nothing is left behind.

    Args:
        folder: where the shard goes; must exist.
        name: its file name, such as `train-000000.tar`.
        place: move both files into place at the end; False leaves that to the caller, see `place`.

    Attributes:
        written: what was written, after the `with` block.
    """

    written: "Written"

    def __init__(self, folder: Path, name: str, *, place: bool = True) -> None:
        self.folder, self.name, self._place = folder, name, place
        self._parts = tuple(folder / f".{final}.{os.getpid()}.part" for final in (name, index_name(name)))
        self._file: IO[bytes] = self._parts[0].open("wb")
        self._digest = sha256()
        self._offset = 0
        self._texts = 0
        self._samples: dict[str, dict[str, Member]] = {}
        self._skipped: list[Skipped] = []

    def add(self, key: str, pictures: Sequence[tuple[str, bytes]], record: Mapping[str, Any]) -> None:
        """Write a sample.

        Args:
            key: see `make_key`; unique in the shard.
            pictures: suffix and bytes of one picture, or of two.
            record: its json; `texts` is a list.

        Raises:
            ValueError: the key is malformed or was used before, or there is no picture.
        """
        if not _KEY.fullmatch(key) or key in self._samples or not pictures:
            raise ValueError(f"the sample key {key!r} is malformed or used twice, or the sample has no picture")
        several = len(pictures) > 1
        members = self._samples[key] = {}
        for position, (suffix, data) in enumerate(pictures):
            full = f"{position}.{suffix}" if several else suffix
            members[full] = self._write(f"{key}.{full}", data)
        members["json"] = self._write(f"{key}.json", _encode(record).encode())
        self._texts += len(record["texts"])

    def skip(self, key: str, reason: str) -> None:
        """Note a sample that cannot be written."""
        self._skipped.append(Skipped(key=key, reason=reason))

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, _: TracebackType | None) -> None:
        try:
            if error is None:
                self.written = self._end()
                if self._place:
                    place(self.folder, self.written)
                return
        except BaseException:
            self._discard()
            raise
        self._discard()

    def _end(self) -> "Written":
        """End the tar and write its index."""
        self._put(b"\0" * (2 * _BLOCK))
        self._file.close()
        samples = tuple(SampleIndex.model_construct(key=key, members=found) for key, found in self._samples.items())
        index = ShardIndex.model_construct(
            name=self.name,
            bytes=self._offset,
            sha256=self._digest.hexdigest(),
            texts=self._texts,
            samples=samples,
            skipped=tuple(self._skipped),
        )
        content = _encode(index.model_dump(mode="json")).encode()
        self._parts[1].write_bytes(content)
        entry = index.entry(sha256(content).hexdigest())
        return Written(entry=entry, skipped=tuple(self._skipped), parts=self._parts)

    def _discard(self) -> None:
        self._file.close()
        for part in self._parts:
            part.unlink(missing_ok=True)

    def _write(self, name: str, data: bytes) -> Member:
        self._put(_header(name, len(data)))
        offset = self._offset
        self._put(data)
        self._put(bytes(-len(data) % _BLOCK))
        return offset, len(data), sha256(data).hexdigest()

    def _put(self, data: bytes) -> None:
        self._file.write(data)
        self._digest.update(data)
        self._offset += len(data)


@dataclass(frozen=True, kw_only=True)
class Written:
    """A shard that was written.

    Attributes:
        entry: what the folder's index says of it.
        skipped: samples that should be in it, and could not be imported.
        parts: its two files, shard and index, while they have their temporary names; none once they are in place.
    """

    entry: ShardEntry
    skipped: tuple[Skipped, ...]
    parts: tuple[Path, ...] = ()


def place(folder: Path, written: Written) -> None:
    """Move a shard and then its index into place, each only once its bytes are on the disk."""
    names = (written.entry.name, index_name(written.entry.name))
    for part, name in zip(written.parts, names, strict=True):
        with part.open("rb") as file:
            os.fsync(file.fileno())
        part.replace(folder / name)


_encode = json.JSONEncoder(ensure_ascii=False, separators=(",", ":")).encode


def _header(name: str, size: int) -> bytes:
    """Return the ustar header that `tarfile` writes, several times as fast: name, size and checksum alone differ."""
    named, sized = name.encode("ascii"), b"%011o" % size
    checksum = _HEADER_SUM + sum(named) + sum(sized)
    return b"".join(
        (named.ljust(100, b"\0"), _HEADER[100:124], sized, _HEADER[135:148], b"%06o\0 " % checksum, _HEADER[156:])
    )


def _template() -> bytes:
    info = tarfile.TarInfo("")
    info.mode = 0o444
    return info.tobuf(format=tarfile.USTAR_FORMAT)


_HEADER = _template()
_HEADER_SUM = sum(_HEADER[100:124]) + sum(_HEADER[135:148]) + sum(b" " * 8) + sum(_HEADER[156:])
"""A checksum counts its own eight places as blanks (POSIX.1-1988)."""


@dataclass(frozen=True, slots=True)
class ShardPicture:
    """One sample's picture, read from its place in a shard. Two pictures are put side by side, on white.

    Attributes:
        shard: the tar file.
        name: sample key, for messages.
        members: place of the one or two files.
    """

    shard: Path
    name: str
    members: tuple[Member, ...]

    @property
    def key(self) -> str:
        """SHA-256 of the picture file; of two, both."""
        return "+".join(member[2] for member in self.members)

    def load(self) -> Image.Image:
        """Decode to RGB.

        Raises:
            CvlmError: the shard is missing or was changed after the import.
        """
        images = [decode(read_member(self.shard, m, self.name), f"{self.shard}: {self.name}") for m in self.members]
        if len(images) == 1:
            return images[0]
        height = max(image.height for image in images)
        paper = Image.new("RGB", (sum(image.width for image in images), height), "white")
        left = 0
        for image in images:
            paper.paste(image, (left, (height - image.height) // 2))
            left += image.width
        return paper

    def check(self) -> None:
        """Read to the end without keeping anything; several times as fast as `load` for JPEG.

        Raises:
            CvlmError: as `load` does.
        """
        for member in self.members:
            check(read_member(self.shard, member, self.name), f"{self.shard}: {self.name}")


class ShardReader:
    """Random access to one split of an import; `len` is exact. Tar headers are never parsed.

    Args:
        folder: what `cvlm data import` wrote.
        split: such as `train`.
        index: the folder's index, when it was read already.

    Raises:
        CvlmError: no import, no such split, or an index that was changed.
    """

    def __init__(self, folder: Path, split: str, index: FolderIndex | None = None) -> None:
        self.folder, self.split = folder, split
        self.index = index if index is not None else read_folder_index(folder)
        if split not in self.index.splits:
            raise CvlmError(f"{folder} has no split {split!r}; it has {', '.join(self.index.splits)}")
        self._places: list[tuple[Path, SampleIndex]] = []
        for entry in self.index.splits[split]:
            shard = read_shard_index(folder, entry.name, entry.index_sha256)
            self._places += [(folder / entry.name, sample) for sample in shard.samples]

    def __len__(self) -> int:
        return len(self._places)

    @property
    def samples(self) -> list[SampleIndex]:
        """Where every sample stands, in the order of the split."""
        return [sample for _, sample in self._places]

    def record(self, position: int) -> dict[str, Any]:
        """Return the json of a sample.

        Raises:
            CvlmError: the shard is missing or was changed after the import.
        """
        shard, sample = self._places[position]
        return json.loads(read_member(shard, sample.members["json"], sample.key))

    def picture(self, position: int) -> ShardPicture:
        """Return the picture of a sample, not yet read; two pictures count as one."""
        shard, sample = self._places[position]
        return ShardPicture(shard, sample.key, tuple(sample.pictures))

    def pictures(self, position: int) -> list[ShardPicture]:
        """Return the one or two pictures of a sample, not yet read."""
        shard, sample = self._places[position]
        return [ShardPicture(shard, sample.key, (member,)) for member in sample.pictures]


def read_member(shard: Path, member: Member, sample: str) -> bytes:
    """Return the bytes of a member, compared with its checksum.

    Raises:
        CvlmError: the shard is missing, shorter than it was, or other bytes stand there; `sample` is named.
    """
    offset, size, stated = member
    try:
        file = _open(shard, shard.stat().st_ino)  # held, or another thread's opening could close it
        data = os.pread(file.fileno(), size, offset)
    except OSError as error:
        raise CvlmError(f"cannot read {shard}: {error.strerror}. Import again.") from error
    if sha256(data).hexdigest() != stated:
        raise CvlmError(f"{shard}: the bytes of sample {sample!r} were changed after the import. Import again.")
    return data


@lru_cache(maxsize=64)
def _open(shard: Path, inode: int) -> IO[bytes]:
    """Keep the shards of late open; a shard that was replaced has another inode. Positions play no part (pread)."""
    return shard.open("rb", buffering=0)
