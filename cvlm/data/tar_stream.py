"""Samples out of a tar that comes as a stream, from anywhere: what is odd is refused, and nothing is written to disk.

webdataset opens the stream (`pipe:`, `https:`, a file, ...). Its own reader is not used behind that: it takes members
of any size and name, and ends in silence where a header is damaged.
"""

import tarfile
import zlib
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import dataclass, field
from typing import IO, Any, Self

from cvlm.data.pixels import MAX_FILE_BYTES, safe_name
from cvlm.errors import CvlmError

_MAX_HEADER = 2**20
_BLOCK = 2**20


@dataclass(kw_only=True)
class RawSample:
    """Members that stand side by side under one key.

    Attributes:
        name: shard and key, for messages.
        key: file name up to the first dot.
        members: lower-case suffix -> bytes.
        problem: why the sample is refused; None for a good one.
    """

    name: str
    key: str
    members: dict[str, bytes] = field(default_factory=dict)
    problem: str | None = None


def read_samples(url: str) -> Iterator[RawSample]:
    """Read one shard from its beginning to its end.

    Raises:
        CvlmError: it cannot be opened, or is damaged between its members: what would follow is lost.
    """
    sample: RawSample | None = None
    for name, data, problem in _members(url):
        folder, _, base = name.rpartition("/")
        stem, _, suffix = base.partition(".")
        key = f"{folder}/{stem}" if folder else stem
        if not stem or not suffix:
            continue  # hidden files and those that belong to no sample, as webdataset has it
        if sample is None or key != sample.key:
            if sample is not None:
                yield sample
            sample = RawSample(name=f"{url}: {key[:200]!r}", key=key)
        if suffix.lower() in sample.members:
            problem = f"{suffix!r} stands twice"
        sample.members[suffix.lower()] = data
        sample.problem = sample.problem or problem
    if sample is not None:
        yield sample


def _members(url: str) -> Iterator[tuple[str, bytes, str | None]]:
    """Yield name, bytes and problem of every member that is no folder."""
    stream = None
    try:
        stream = _open(url)
        with tarfile.open(fileobj=stream, mode="r|*", tarinfo=_Header) as archive:
            for member in archive:
                archive.members.clear()  # type: ignore[attr-defined]  # it would keep every header of a long stream
                if not member.isdir():
                    yield member.name, *_content(archive, member)
    except (OSError, EOFError, tarfile.TarError, zlib.error) as error:
        raise CvlmError(f"cannot read the shard {url} (to its end): {error or type(error).__name__}") from error
    finally:
        # A program that still has something to say when we stop listening ends with an error of no interest.
        with suppress(OSError):
            if stream is not None:
                stream.close()


def _open(url: str) -> IO[bytes]:
    from webdataset import gopen

    return gopen(url, "rb")


def _content(archive: tarfile.TarFile, member: tarfile.TarInfo) -> tuple[bytes, str | None]:
    file = archive.extractfile(member) if member.isreg() else None
    if file is None:
        return b"", "a link or device, not a plain file"
    if member.size > MAX_FILE_BYTES:
        while file.read(_BLOCK):  # tarfile's own way forward would not notice the end of the data
            pass
        return b"", f"{member.size:,} bytes; more than {MAX_FILE_BYTES:,} are refused"
    data = file.read()
    try:
        safe_name(member.name)
    except CvlmError as error:
        return b"", str(error)
    return data, None


class _Header(tarfile.TarInfo):
    """Takes a damaged header for damage, where `tarfile` takes it for the end, and refuses absurd ones."""

    @classmethod
    def frombuf(cls, buf: bytes | bytearray, encoding: str | None, errors: str) -> Self:
        """Parse a header."""
        header = super().frombuf(buf, encoding, errors)  # type: ignore[arg-type]
        if header.type == tarfile.GNUTYPE_SPARSE or (not header.isreg() and header.size > _MAX_HEADER):
            raise tarfile.ReadError("sparse files and headers above one megabyte are refused")
        return header

    @classmethod
    def fromtarfile(cls, tarfile: Any) -> Self:
        """Read a header."""
        return _read_header(super().fromtarfile, tarfile)


def _read_header(read: Any, archive: tarfile.TarFile) -> Any:
    try:
        return read(archive)
    except tarfile.EOFHeaderError:  # type: ignore[attr-defined]
        raise  # the end, as it should be
    except tarfile.HeaderError as error:
        raise tarfile.ReadError(f"damaged, or cut off, at byte {archive.offset:,}: {error}") from error
