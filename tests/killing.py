"""Killing a process in the middle of its work."""

import signal
import subprocess
import time
from collections.abc import Callable


def kill_after(process: subprocess.Popen, count: Callable[[], int], more: int, pause: float) -> bool:
    """Wait until `count` has grown by `more` and a moment longer, then kill; returns whether it was still running."""
    goal = count() + more
    while count() < goal and process.poll() is None:
        time.sleep(0.001)
    time.sleep(pause)
    running = process.poll() is None
    process.send_signal(signal.SIGKILL)
    process.communicate()
    return running
