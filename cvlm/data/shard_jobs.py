"""Writing the shards of an import on several processes, each shard once, also over several attempts."""

import ctypes
import gc
import multiprocessing
import os
import signal
import sys
from collections.abc import Iterator
from concurrent.futures import FIRST_COMPLETED, Future, ProcessPoolExecutor, wait
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass, replace
from hashlib import sha256
from pathlib import Path

from cvlm.data.importers.records import Sample
from cvlm.data.pixels import Check, Resize, check, shrink
from cvlm.data.shard_index import index_name, read_shard_index
from cvlm.data.shards import ShardWriter, Written, place
from cvlm.errors import CvlmError


@dataclass(frozen=True, kw_only=True)
class ShardJob:
    """What one worker does at a time: one shard."""

    folder: Path
    name: str
    samples: list[Sample]
    keys: list[str]
    resize: Resize | None
    check: Check

    def pairs(self) -> Iterator[tuple[str, Sample]]:
        """Return key and sample of each."""
        return zip(self.keys, self.samples, strict=True)


def write_shards(jobs: list[ShardJob], workers: int) -> Iterator[Written]:
    """Yield every shard, in the order in which they are finished; those of earlier attempts come first.

    Workers write under temporary names. This process waits for the disk and moves the files into place, while the
    workers go on with the next shards.

    Raises:
        CvlmError: a worker was killed.
    """
    missing = []
    for job in jobs:
        written = _stands(job)
        if written is not None:
            yield written
        else:
            missing.append(job)
    if workers == 1 or len(missing) < 2:
        for job in missing:
            yield _placed(job.folder, write_shard(job))
        return
    # Forked workers start in no time; new interpreters would load torch first. They never touch it.
    method = "fork" if sys.platform == "linux" else "spawn"
    pool = ProcessPoolExecutor(
        min(workers, len(missing)), multiprocessing.get_context(method), _start_worker, (os.getpid(), missing)
    )
    try:
        waiting: set[Future[Written]] = {pool.submit(_write_numbered, number) for number in range(len(missing))}
        while waiting:
            finished, waiting = wait(waiting, return_when=FIRST_COMPLETED)
            for future in finished:
                yield _placed(missing[0].folder, future.result())
    except BrokenProcessPool as error:
        raise CvlmError(
            "a worker of the import was killed (out of memory?); give the same command again, perhaps with --workers 1"
        ) from error
    finally:
        pool.shutdown(cancel_futures=True)


def _placed(folder: Path, written: Written) -> Written:
    place(folder, written)
    return replace(written, parts=())


def _stands(job: ShardJob) -> Written | None:
    """Return a shard that an earlier attempt finished."""
    path = job.folder / job.name
    if not (job.folder / index_name(job.name)).exists() or not path.exists():
        return None
    index = read_shard_index(job.folder, job.name)
    if index.bytes != path.stat().st_size:
        return None
    entry = index.entry(sha256((job.folder / index_name(job.name)).read_bytes()).hexdigest())
    return Written(entry=entry, skipped=index.skipped)


def write_shard(job: ShardJob) -> Written:
    """Write one shard under temporary names; a picture that cannot be read or is damaged is left out and noted."""
    with ShardWriter(job.folder, job.name, place=False) as writer:
        for key, sample in job.pairs():
            try:
                pictures = [_picture(image.read(), sample.id, job) for image in sample.images]
            except CvlmError as error:
                writer.skip(key, str(error))
                continue
            record = {"id": sample.id, "texts": [text.to_json() for text in sample.texts]}
            writer.add(key, pictures, record)
    return writer.written


def _picture(data: bytes, where: str, job: ShardJob) -> tuple[str, bytes]:
    if job.resize is not None:
        return shrink(data, where, job.resize, job.check)
    return check(data, where, job.check)[0], data


def cores() -> int:
    """Return how many processes can run at once."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


_jobs: list[ShardJob] = []
"""In a worker: all jobs. A forked worker inherits them, so that only numbers go through a pipe."""


def _write_numbered(number: int) -> Written:
    return write_shard(_jobs[number])


def _start_worker(parent: int, jobs: list[ShardJob]) -> None:
    """Leave Ctrl-C to the parent, and do not outlive it: a killed parent cannot call its workers off."""
    _jobs[:] = jobs
    gc.freeze()
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    if sys.platform == "linux":
        die_with_parent = 1
        ctypes.CDLL(None).prctl(die_with_parent, signal.SIGKILL)
        if os.getppid() != parent:
            os._exit(1)
