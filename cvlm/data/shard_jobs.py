"""Writing the shards of an import on several processes, each shard once, also over several attempts."""

import ctypes
import multiprocessing
import os
import signal
import sys
from collections.abc import Iterator
from concurrent.futures import FIRST_COMPLETED, Future, ProcessPoolExecutor, wait
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass
from pathlib import Path

from cvlm.data.importers.records import Sample
from cvlm.data.pixels import Resize, check, shrink
from cvlm.data.shard_index import ShardIndex, index_name, read_shard_index
from cvlm.data.shards import ShardWriter
from cvlm.errors import CvlmError


@dataclass(frozen=True, kw_only=True)
class ShardJob:
    """What one worker does at a time: one shard."""

    folder: Path
    name: str
    samples: list[Sample]
    keys: list[str]
    resize: Resize | None

    def pairs(self) -> Iterator[tuple[str, Sample]]:
        """Return key and sample of each."""
        return zip(self.keys, self.samples, strict=True)


def write_shards(jobs: list[ShardJob], workers: int) -> Iterator[ShardIndex]:
    """Yield the index of every shard, in the order in which they are finished; those of earlier attempts come first.

    Raises:
        CvlmError: a worker was killed.
    """
    missing = []
    for job in jobs:
        index = _stands(job)
        if index is not None:
            yield index
        else:
            missing.append(job)
    if workers == 1 or len(missing) < 2:
        yield from map(write_shard, missing)
        return
    # Forked workers start in no time; new interpreters would load torch first. They never touch it.
    method = "fork" if sys.platform == "linux" else "spawn"
    pool = ProcessPoolExecutor(
        min(workers, len(missing)), multiprocessing.get_context(method), _quiet_worker, (os.getpid(),)
    )
    try:
        waiting: set[Future[ShardIndex]] = {pool.submit(write_shard, job) for job in missing}
        while waiting:
            finished, waiting = wait(waiting, return_when=FIRST_COMPLETED)
            yield from (future.result() for future in finished)
    except BrokenProcessPool as error:
        raise CvlmError(
            "a worker of the import was killed (out of memory?); give the same command again, perhaps with --workers 1"
        ) from error
    finally:
        pool.shutdown(cancel_futures=True)


def _stands(job: ShardJob) -> ShardIndex | None:
    """Return the index of a shard that an earlier attempt finished."""
    path = job.folder / job.name
    if not (job.folder / index_name(job.name)).exists() or not path.exists():
        return None
    index = read_shard_index(job.folder, job.name)
    return index if index.bytes == path.stat().st_size else None


def write_shard(job: ShardJob) -> ShardIndex:
    """Write one shard; a picture that cannot be read or decoded is left out and noted."""
    with ShardWriter(job.folder, job.name) as writer:
        for key, sample in job.pairs():
            try:
                pictures = [_picture(image.read(), sample.id, job.resize) for image in sample.images]
            except CvlmError as error:
                writer.skip(key, str(error))
                continue
            record = {"id": sample.id, "texts": [text.to_json() for text in sample.texts]}
            writer.add(key, pictures, record)
    return writer.index


def _picture(data: bytes, where: str, resize: Resize | None) -> tuple[str, bytes]:
    if resize is not None:
        return shrink(data, where, resize)
    return check(data, where)[0], data


def cores() -> int:
    """Return how many processes can run at once."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def _quiet_worker(parent: int) -> None:
    """Leave Ctrl-C to the parent, and do not outlive it: a killed parent cannot call its workers off."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    if sys.platform == "linux":
        die_with_parent = 1
        ctypes.CDLL(None).prctl(die_with_parent, signal.SIGKILL)
        if os.getppid() != parent:
            os._exit(1)
