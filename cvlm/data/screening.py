"""Before a split is used: which of its samples still are what was imported, and can be decoded.

A disk or a copy can damage a sample after the import. Finding that out in the third epoch would cost two; so every
sample is read once, checked, and left out if it is broken, within a budget.
"""

import json
import logging
import os
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from hashlib import sha256
from pathlib import Path

from cvlm.data.shard_jobs import cores
from cvlm.data.shards import ShardReader
from cvlm.errors import CvlmError, listed
from cvlm.files import write_atomic

logger = logging.getLogger(__name__)

Broken = dict[int, str]
"""Position in the split -> what is wrong with the sample."""


def screen(reader: ShardReader, number: int, share: float) -> Broken:
    """Check the first `number` samples of a split: checksums, and pictures to their last byte.

    What was found is kept in the user's cache folder until a shard changes (size or time of writing), so the next run
    does not read everything again. Where nothing can be written there, it does.

    Args:
        reader: the split.
        number: how many samples are going to be used.
        share: of them that may be broken.

    Raises:
        CvlmError: more are; the first ones are named.
    """
    stamp = _stamp(reader, number)
    broken = _read_stamp(stamp)
    if broken is None:
        with ThreadPoolExecutor(cores()) as pool:  # hashing and decoding leave the interpreter's lock
            found = pool.map(lambda position: _problem(reader, position), range(number))
            broken = {position: problem for position, problem in enumerate(found) if problem is not None}
        _write_stamp(stamp, broken)
    what = f"samples of {reader.folder}, split {reader.split!r},"
    refuse_too_many(what, len(broken), list(broken.values()), number, share)
    for problem in broken.values():
        logger.warning("left out, data.skip allows it: %s", problem)
    return broken


def refuse_too_many(what: str, broken: int, problems: Sequence[str], number: int, share: float) -> None:
    """Refuse more than `share` of `number`, naming the first five problems.

    Raises:
        CvlmError: there are more.
    """
    allowed = int(share * number)
    if broken > allowed:
        raise CvlmError(
            f"{broken} {what} are broken; of {number:,} may be {allowed} (data.skip: {share:g}). Correct the data, or "
            f"raise data.skip to do without them.{listed(problems)}"
        )


def cache_folder() -> Path:
    """Return the user's folder for what can be made again: `CVLM_CACHE`, else `cvlm` in the usual one."""
    usual = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "cvlm"
    return Path(os.environ.get("CVLM_CACHE") or usual)


def _problem(reader: ShardReader, position: int) -> str | None:
    try:
        reader.record(position)
        for picture in reader.pictures(position):
            picture.check()
    except CvlmError as error:
        return str(error)
    return None


def _stamp(reader: ShardReader, number: int) -> Path:
    """Return the file that keeps the verdict on these very files."""
    identity: list[object] = [number]
    for entry in reader.index.splits[reader.split]:
        try:
            status = (reader.folder / entry.name).stat()
        except OSError as error:
            raise CvlmError(f"cannot read {reader.folder / entry.name}: {error.strerror}. Import again.") from error
        path = str((reader.folder / entry.name).resolve())
        identity.append([path, entry.index_sha256, status.st_size, status.st_mtime_ns, status.st_ino])
    return cache_folder() / "screened" / f"{sha256(json.dumps(identity).encode()).hexdigest()}.json"


def _read_stamp(path: Path) -> Broken | None:
    try:
        return {int(position): str(problem) for position, problem in json.loads(path.read_bytes()).items()}
    except (OSError, ValueError, AttributeError):
        return None


def _write_stamp(path: Path, broken: Broken) -> None:
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        write_atomic(path, json.dumps(broken).encode())
    except OSError as error:
        logger.info("the check of the data is not kept, it will be made again: %s", error)
