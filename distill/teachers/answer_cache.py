"""Paid answers on disk: written as they come, shared by processes, never paid for twice."""

import json
import os
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from filelock import FileLock

from distill.errors import DistillError

Record = dict[str, Any]


class AnswerCache:
    """`answers.jsonl` in a folder: one line per paid request, only ever appended to.

    A line is on disk before its answer is used, so a kill loses what was in flight and nothing else. A line that a kill
    (or a full disk) cut in two is cut off.

    Args:
        folder: made when the first line is written.
    """

    def __init__(self, folder: Path) -> None:
        self.file = folder / "answers.jsonl"
        self.requests = self.input_tokens = self.output_tokens = 0
        """Totals over all lines, the lost requests' included."""
        self._records: dict[str, Record] = {}
        self._read = 0
        self._lock = threading.Lock()

    @contextmanager
    def held(self) -> Iterator[None]:
        """Read what other processes have added, and keep them waiting; needed around `add`.

        Raises:
            DistillError: the folder cannot be written, or a line is damaged.
        """
        try:
            self.file.parent.mkdir(parents=True, exist_ok=True)
            lock = FileLock(self.file.with_suffix(".lock"))
            lock.acquire()
        except OSError as error:
            raise DistillError(
                f"cannot keep paid answers in {self.file.parent}: {error}; choose another cache"
            ) from error
        try:
            self._catch_up()
            yield
        finally:
            lock.release()

    def find(self, key: str) -> Record | None:
        """Return the record of a request."""
        return self._records.get(key)

    def add(self, record: Record) -> None:
        """Append a record; it is on disk when this returns. Threads may call it at the same time."""
        line = (json.dumps(record, ensure_ascii=False) + "\n").encode()
        with self._lock, self.file.open("ab") as stream:
            stream.write(line)
            stream.flush()
            os.fsync(stream.fileno())
            self._read += len(line)
            self._count(record)

    def _catch_up(self) -> None:
        if not self.file.exists():
            return
        with self.file.open("r+b") as stream:
            stream.seek(self._read)
            fresh = stream.read()
            whole = fresh.rfind(b"\n") + 1
            if whole < len(fresh):
                stream.truncate(self._read + whole)
        for number, line in enumerate(fresh[:whole].splitlines(), start=1):
            try:
                self._count(json.loads(line))
            except (ValueError, TypeError, KeyError, AttributeError) as error:
                raise DistillError(
                    f"{self.file}: line {number} behind byte {self._read} is damaged ({error}); delete that line, and "
                    "its answer is asked for again"
                ) from error
        self._read += whole

    def _count(self, record: Record) -> None:
        if record["answer"] is not None:
            self._records[record["key"]] = record
        self.requests += 1
        self.input_tokens += record["input_tokens"]
        self.output_tokens += record["output_tokens"]
