"""When, where and with which versions a number was measured."""

import platform
from datetime import UTC, datetime
from importlib.metadata import version
from importlib.util import find_spec
from typing import Any

import torch

from cvlm.cost import machine_info

MODULES = {"open_clip_torch": "open_clip", "pillow": "PIL"}
PACKAGES = ("cvlm", "torch", "transformers", "timm", "open_clip_torch", "accelerate", "deepspeed", "numpy", "pillow")


def environment(device: str) -> dict[str, Any]:
    """Describe when, where and with which versions something began."""
    return {
        "begun": now(),
        "machine": machine_info(),
        "device": device,
        "threads": torch.get_num_threads(),
        "platform": platform.platform(),
        "python": platform.python_version(),
        "packages": packages(),
    }


def now() -> str:
    """Return date and time in UTC, to the second."""
    return datetime.now(UTC).isoformat(timespec="seconds")


def packages() -> dict[str, str]:
    """Return package -> version of those that can change a number, as far as they are installed."""
    return {name: version(name) for name in PACKAGES if find_spec(MODULES.get(name, name)) is not None}
