"""Energy counters of the hardware: NVIDIA's NVML and the kernel's RAPL.

Both count the whole chip, whoever uses it: on a shared machine a measurement includes the neighbours.
"""

import ctypes
import logging
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Protocol

from cvlm.cost.devices import CPU_UTILISATION, CPU_WATTS, GPU_UTILISATION, find_device

logger = logging.getLogger(__name__)

POWERCAP = Path("/sys/class/powercap")


class EnergyCounter(Protocol):
    """A counter of joules that only ever rises."""

    def read(self) -> float:
        """Joules since an arbitrary start."""
        ...


class NvmlCounter:
    """Total energy of some NVIDIA GPUs, from the counter that boards since Volta keep.

    NVML is called through ctypes: the library comes with the driver, so no package is needed.
    """

    def __init__(self, uuids: Sequence[str], library: Any = None) -> None:
        """Open the counters.

        Args:
            uuids: ``GPU-...`` names. Indices would not do: NVML numbers all boards, torch only the visible ones.
            library: Loaded NVML library; None loads the driver's.

        Raises:
            OSError: There is no NVML, no such board, or a board has no counter.
        """
        self._library = ctypes.CDLL("libnvidia-ml.so.1") if library is None else library
        self._check(self._library.nvmlInit_v2(), "nvmlInit_v2")
        self._handles = [self._handle(uuid) for uuid in uuids]
        self.read()

    def read(self) -> float:
        """Joules, summed over the boards."""
        total = 0.0
        for handle in self._handles:
            millijoules = ctypes.c_ulonglong()
            code = self._library.nvmlDeviceGetTotalEnergyConsumption(handle, ctypes.byref(millijoules))
            self._check(code, "nvmlDeviceGetTotalEnergyConsumption")
            total += millijoules.value / 1000
        return total

    def _handle(self, uuid: str) -> ctypes.c_void_p:
        handle = ctypes.c_void_p()
        code = self._library.nvmlDeviceGetHandleByUUID(uuid.encode(), ctypes.byref(handle))
        self._check(code, "nvmlDeviceGetHandleByUUID")
        return handle

    @staticmethod
    def _check(code: int, call: str) -> None:
        if code != 0:
            raise OSError(f"NVML: {call} returned error {code}")


class RaplCounter:
    """Energy of all CPU packages, from the kernel's powercap files (Intel, and AMD under the same names).

    A package counter wraps around within minutes to hours, so `read` must be called more often than that.
    """

    def __init__(self, root: Path = POWERCAP) -> None:
        """Open the counters.

        Args:
            root: The powercap directory.

        Raises:
            OSError: No package counter is there, or it may not be read (most systems keep it for root).
        """
        # Sub-zones (core, uncore, dram) carry a second colon and are part of, or beside, their package.
        zones = [zone for zone in sorted(root.glob("intel-rapl:*")) if zone.name.count(":") == 1]
        self._zones = [zone for zone in zones if (zone / "name").read_text().startswith("package")]
        if not self._zones:
            raise OSError(f"no CPU package counter under {root}")
        self._ranges = [int((zone / "max_energy_range_uj").read_text()) for zone in self._zones]
        self._last = self._microjoules()
        self._total = 0

    def read(self) -> float:
        """Joules since this object was made, over all packages."""
        now = self._microjoules()
        # A counter that fell has wrapped once.
        self._total += sum(
            after - before if after >= before else after - before + size
            for before, after, size in zip(self._last, now, self._ranges, strict=True)
        )
        self._last = now
        return self._total / 1e6

    def _microjoules(self) -> list[int]:
        return [int((zone / "energy_uj").read_text()) for zone in self._zones]


def open_gpu_counter(indices: Sequence[int]) -> EnergyCounter | None:
    """Open the energy counter of the GPUs that torch knows under these indices, None where there is none."""
    import torch

    if any(index >= torch.cuda.device_count() for index in indices):
        # The launcher hides the other GPUs of the node from this process: a part must not pass for the whole.
        return None
    names = [str(torch.cuda.get_device_properties(index).uuid) for index in indices]
    try:
        return NvmlCounter([name if name.startswith("GPU-") else f"GPU-{name}" for name in names])
    except (OSError, AttributeError) as error:
        logger.info("energy will be estimated: %s", error)
        return None


def open_cpu_counter(root: Path = POWERCAP) -> EnergyCounter | None:
    """Open the energy counter of the CPU packages, None where there is none or it may not be read."""
    try:
        return RaplCounter(root)
    except OSError as error:
        logger.info("energy will be estimated: %s", error)
        return None


def assumed_watts(device_name: str, devices: int, *, is_cpu: bool) -> float | None:
    """Power to assume where no counter can be read: thermal design power times an assumed utilisation.

    Args:
        device_name: Name that torch gives the GPU; not used for a CPU.
        devices: Number of GPUs. A CPU counts once per machine.
        is_cpu: The work runs on the CPU.

    Returns:
        Watts, None for a device without a public figure.
    """
    if is_cpu:
        return CPU_WATTS * CPU_UTILISATION
    spec = find_device(device_name)
    return None if spec is None or spec.watts is None else spec.watts * GPU_UTILISATION * devices
