"""Timing two ways of doing the same work in one run, and the peak memory of one of them."""

import os
import platform
import re
import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
import psutil

from benchmarks.environment import now

Work = Callable[[], Any]


def time_pair(ours: Callable[[], Work], reference: Callable[[], Work], repeats: int) -> dict[str, Any]:
    """Time both in turns, so that a busy minute of the machine meets both.

    Args:
        ours: Prepares one repeat and returns the work to time.
        reference: The same for the other way.
        repeats: How often each is timed.

    Returns:
        Seconds of every repeat, and the median, smallest and largest ratio reference / ours over the repeats.
    """
    seconds: dict[str, list[float]] = {"ours": [], "reference": []}
    for _ in range(repeats):
        for name, prepare in (("ours", ours), ("reference", reference)):
            work = prepare()
            start = time.perf_counter()
            work()
            seconds[name].append(time.perf_counter() - start)
    ratios = np.array(seconds["reference"]) / np.array(seconds["ours"])
    spread = {"median": float(np.median(ratios)), "min": float(ratios.min()), "max": float(ratios.max())}
    return {"repeats": repeats, "seconds": seconds, "times_faster": spread}


def setting(packages: Sequence[str]) -> dict[str, Any]:
    """Return the date, the machine and the versions that a measurement belongs to."""
    return {
        "date": now(),
        "machine": {
            "processor": _processor(),
            "cores": os.cpu_count(),
            "memory_gib": round(psutil.virtual_memory().total / 2**30, 1),
            "threads": os.environ.get("OMP_NUM_THREADS", "not set"),
            # Other people's work on the machine makes times longer; a reader should be able to see it.
            "load_average": [round(load, 2) for load in os.getloadavg()],
        },
        "versions": {"python": platform.python_version(), **{name: version(name) for name in packages}},
    }


def peak_growth(work: Work) -> int:
    """Return by how many bytes the work makes this process grow at its peak; Linux only.

    Call it in a process of its own. The kernel's high-water mark of the present program (VmHWM) is read, not
    ``ru_maxrss``, which starts at the peak of the process that started this one. Where the mark cannot be reset, memory
    that was higher before the work than at its start makes the result too large, never too small.
    """
    with suppress(OSError):
        Path("/proc/self/clear_refs").write_text("5")
    start = psutil.Process().memory_info().rss
    work()
    peak = re.search(r"VmHWM:\s+(\d+) kB", Path("/proc/self/status").read_text())
    assert peak is not None, "Linux states VmHWM"
    return int(peak[1]) * 1024 - start


def _processor() -> str:
    try:
        found = re.search(r"model name\s*: (.*)", Path("/proc/cpuinfo").read_text())
    except OSError:
        found = None
    return found[1] if found else platform.processor()
