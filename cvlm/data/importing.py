"""`cvlm data import`: from a source to shards, on several processes, resumable, with the same bytes in any case.

What goes into which shard is settled before the first one is written, so workers share nothing. A shard counts as done
once its index file stands; after a kill the same command writes what is missing.
"""

import gc
import json
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from hashlib import sha256
from pathlib import Path
from posixpath import basename, splitext
from typing import Any

from filelock import FileLock, Timeout

from cvlm.data.answers import build_vocabulary, coverage, default_min_count
from cvlm.data.importers import ImportOptions, Source, read_source
from cvlm.data.importers.records import IMAGE_SUFFIXES, Sample, check_budget
from cvlm.data.pixels import Check, Resize
from cvlm.data.shard_index import (
    INDEX,
    PLAN,
    SCHEMA,
    FolderIndex,
    ShardEntry,
    Skipped,
    read_folder_index,
    write_folder_index,
    write_json,
)
from cvlm.data.shard_jobs import ShardJob, cores, write_shards
from cvlm.data.shards import Written, make_key
from cvlm.errors import CvlmError
from cvlm.progress import Progress


@dataclass(frozen=True, kw_only=True)
class ImportSettings:
    """How to import.

    Attributes:
        source: see `ImportOptions`.
        resize: shrink pictures; None keeps their bytes.
        check: how pictures are checked, see `cvlm.data.pixels.Check`.
        min_count: how often an answer must occur to enter the vocabulary; None as `default_min_count` says.
        shard_samples: pictures per shard.
        workers: processes; None takes one per core. It changes no byte.
    """

    source: ImportOptions = field(default_factory=ImportOptions)
    resize: Resize | None = None
    check: Check = "structure"
    min_count: int | None = None
    shard_samples: int = 512
    workers: int | None = None

    def __post_init__(self) -> None:
        for name in ("min_count", "shard_samples", "workers"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise CvlmError(f"{name.replace('_', ' ')} is {value}; give at least 1")
        if not 0 <= self.source.skip <= 1:
            raise CvlmError(f"skip is {self.source.skip}; it is a share between 0 and 1")

    def to_json(self) -> dict[str, Any]:
        """Return what changes the result."""
        return {
            "skip": self.source.skip,
            "columns": dict(self.source.columns),
            "resize": asdict(self.resize) if self.resize is not None else None,
            "check": self.check,
            "min_count": self.min_count,
            "shard_samples": self.shard_samples,
        }


def import_data(
    data_format: str, path: Path, out: Path, settings: ImportSettings, progress: Progress | None = None
) -> FolderIndex:
    """Import a data set into the folder `out`, or finish an import that was stopped.

    Args:
        data_format: a key of `cvlm.data.importers.FORMATS`.
        path: the source.
        out: a folder that is new, empty, or holds this very import.
        settings: see there.
        progress: called with (samples done, all samples).

    Raises:
        CvlmError: the source is damaged beyond `skip`, or `out` holds something else.
    """
    with _older_objects_at_rest():
        source = read_source(data_format, path, settings.source)
        jobs = _plan(source, out, settings)
        fingerprint = _fingerprint(data_format, source, jobs, settings)
        with _folder(out, {"fingerprint": fingerprint, "pictures": _stamp(jobs)}) as complete:
            if complete:
                return read_folder_index(out)
            shards = _write_all(jobs, settings, progress)
            index = _summarise(data_format, source, shards, jobs, settings, fingerprint)
            write_folder_index(out, index)
    return index


@contextmanager
def _older_objects_at_rest() -> Iterator[None]:
    """Keep the garbage collector off everything that is loaded already; walking it costs more than reading a source."""
    gc.freeze()
    try:
        yield
    finally:
        gc.unfreeze()


def _plan(source: Source, out: Path, settings: ImportSettings) -> list[ShardJob]:
    jobs = []
    for split in dict.fromkeys(sample.split for sample in source.samples):
        samples = [sample for sample in source.samples if sample.split == split]
        keys = _keys(samples)
        for number, start in enumerate(range(0, len(samples), settings.shard_samples)):
            job = ShardJob(
                folder=out,
                name=f"{make_key(split)}-{number:06d}.tar",
                samples=samples[start : start + settings.shard_samples],
                keys=keys[start : start + settings.shard_samples],
                resize=settings.resize,
                check=settings.check,
            )
            jobs.append(job)
    return jobs


def _keys(samples: list[Sample]) -> list[str]:
    """Name samples after their files, without folder and suffix where that names one alone."""
    parts = [(s.id, *splitext(basename(s.id))) for s in samples]
    stems = [stem if suffix in IMAGE_SUFFIXES else name for name, stem, suffix in parts]
    times = Counter(stems)
    return [make_key(stem if times[stem] == 1 else s.id) for stem, s in zip(stems, samples, strict=True)]


def _fingerprint(data_format: str, source: Source, jobs: list[ShardJob], settings: ImportSettings) -> str:
    """Hash what the result depends on; of the pictures only which ones they are."""
    files = [file.model_dump() for file in source.files]
    head = [SCHEMA, data_format, source.name, source.rule, files, settings.to_json()]
    digest = sha256(json.dumps(head, sort_keys=True).encode())
    for job in jobs:
        # Shard by shard: as one text, the plan of VQA v2 would take gigabytes.
        plan = [job.name, [[key, [text.to_json() for text in sample.texts]] for key, sample in job.pairs()]]
        digest.update(json.dumps(plan).encode())
    return digest.hexdigest()


def _stamp(jobs: list[ShardJob]) -> str:
    """Hash what tells that picture files were changed between two attempts; it stays out of what the import writes."""
    digest = sha256()
    for job in jobs:
        for sample in job.samples:
            digest.update("".join(f"{image.stamp()}\n" for image in sample.images).encode())
    return digest.hexdigest()


@contextmanager
def _folder(out: Path, plan: dict[str, str]) -> Iterator[bool]:
    """Hold the folder; yields whether this import stands there complete.

    Args:
        out: the folder.
        plan: the import's fingerprint, and the stamp of its pictures.

    Raises:
        CvlmError: it holds other files or another import, or another process is writing to it.
    """
    try:
        out.mkdir(parents=True, exist_ok=True)
        with FileLock(out / ".lock", timeout=10):
            complete = _recognise(out, plan)
            if not complete:
                for part in out.glob(".*.part"):
                    part.unlink(missing_ok=True)
                write_json(out / PLAN, plan)
            yield complete
            (out / PLAN).unlink(missing_ok=True)
        (out / ".lock").unlink(missing_ok=True)
    except Timeout as error:
        raise CvlmError(f"another import is writing to {out}; wait for it, or choose another folder") from error
    except OSError as error:
        raise CvlmError(f"cannot write to {out}: {error.strerror or error}") from error


def _recognise(out: Path, plan: dict[str, str]) -> bool:
    other = f"{out} holds an import of other data, or with other options; choose another folder, or delete it"
    if (out / INDEX).exists():
        if read_folder_index(out).fingerprint != plan["fingerprint"]:
            raise CvlmError(other)
        return True
    if (out / PLAN).exists():
        try:
            stated = json.loads((out / PLAN).read_bytes())
        except ValueError:
            stated = None
        if not isinstance(stated, dict) or stated.get("fingerprint") != plan["fingerprint"]:
            raise CvlmError(other)
        if stated != plan:
            raise CvlmError(
                f"{out} holds a part of this import, but its pictures were changed since (other sizes or times); "
                "delete the folder and import again"
            )
        return False
    strangers = [path.name for path in out.iterdir() if not path.name.startswith(".")]
    if strangers:
        raise CvlmError(f"{out} is not empty: it holds {strangers[0]!r}; give a new folder")
    return False


def _write_all(jobs: list[ShardJob], settings: ImportSettings, progress: Progress | None) -> list[Written]:
    """Write every shard that is missing; returns all in the order of the plan."""
    done: dict[str, Written] = {}
    problems: list[str] = []
    total = sum(len(job.samples) for job in jobs)
    finished = 0
    for shard in write_shards(jobs, settings.workers or cores()):
        done[shard.entry.name] = shard
        finished += shard.entry.samples + len(shard.skipped)
        problems += [f"{skip.key}: {skip.reason}" for skip in shard.skipped]
        check_budget("picture", problems, total, settings.source.skip)
        if progress is not None:
            progress(finished, total)
    return [done[job.name] for job in jobs]


def _summarise(
    data_format: str,
    source: Source,
    shards: list[Written],
    jobs: list[ShardJob],
    settings: ImportSettings,
    fingerprint: str,
) -> FolderIndex:
    """Put the folder's index together: shards per split, vocabulary, coverage, what was skipped."""
    lost = {(shard.entry.name, skip.key) for shard in shards for skip in shard.skipped}
    kept: dict[str, list[Sample]] = {}
    entries: dict[str, list[ShardEntry]] = {}
    for job, shard in zip(jobs, shards, strict=True):
        split = job.samples[0].split
        kept.setdefault(split, []).extend(s for key, s in job.pairs() if (job.name, key) not in lost)
        entries.setdefault(split, []).append(shard.entry)
    answers, min_count = _vocabulary(source, kept.get("train", []), settings)
    asked = {split: [text.answers for s in samples for text in s.texts] for split, samples in kept.items()}
    skipped = [Skipped(key=row, reason=reason) for row, reason in source.skipped]
    return FolderIndex(
        schema=SCHEMA,
        name=source.name,
        data_format=data_format,
        task=source.task,
        rule=source.rule,
        evaluate=source.evaluate,
        licence=source.licence,
        sources=source.files,
        options=settings.to_json(),
        fingerprint=fingerprint,
        splits={split: tuple(found) for split, found in entries.items()},
        answers=answers,
        min_count=min_count,
        coverage={s: coverage(q, answers, source.rule) for s, q in asked.items()} if answers else {},
        skipped=(*skipped, *(skip for shard in shards for skip in shard.skipped)),
    )


def _vocabulary(source: Source, train: list[Sample], settings: ImportSettings) -> tuple[tuple[str, ...], int]:
    if source.task == "retrieval":
        return (), 0
    given = [text.answer for sample in train for text in sample.texts if text.answer is not None]
    if source.answers is not None:
        return source.answers, 0
    min_count = settings.min_count if settings.min_count is not None else default_min_count(len(given))
    answers = build_vocabulary(given, rule=source.rule, min_count=min_count)
    if len(answers) < 2:
        raise CvlmError(
            f"{len(answers)} answer(s) occur {min_count} times among {len(given)} training questions; an answer "
            "vocabulary needs 2: lower --min-count"
        )
    return answers, min_count
