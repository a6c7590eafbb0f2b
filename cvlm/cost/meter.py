"""Metering a phase while it runs."""

import logging
import threading
import time
from types import TracebackType

from cvlm.cost.energy import EnergyCounter, assumed_watts, open_cpu_counter, open_gpu_counter
from cvlm.cost.machine import cpu_model
from cvlm.cost.phase import PhaseCost

logger = logging.getLogger(__name__)


class PhaseMeter:
    """Measure time, memory and energy of the code in a ``with`` block; FLOPs and samples are told to it.

    Make one per process. Each counts its own device; energy is read once per node, by local rank 0, because every
    process would see the same counters. `merge_ranks` puts the processes' records together. On a CPU the processes of a
    node share one device, so there only local rank 0 counts device time and memory.

    Peak memory is what it can be: on CUDA the most that torch had allocated for tensors on this device; elsewhere the
    highest resident memory (RSS) of the process and its children, sampled, so a spike shorter than the interval may be
    missed and pages shared with forked workers count once per process. Blocks must not be nested on one CUDA device:
    the inner one resets the outer one's peak.

    Example:
        >>> with PhaseMeter(device="cpu", resume_from=None) as meter:
        ...     meter.add(flops=2 * 10**9, samples=32)
        >>> meter.cost.samples
        32
    """

    def __init__(
        self,
        *,
        device: str = "cpu",
        devices: int = 1,
        local_rank: int = 0,
        node_devices: int | None = None,
        resume_from: PhaseCost | None = None,
        interval: float = 0.2,
    ) -> None:
        """Configure; nothing is measured before the block begins.

        Args:
            device: Torch device of this process, such as ``cpu`` or ``cuda:1``.
            devices: Devices this process drives.
            local_rank: Rank of this process on its node.
            node_devices: Devices of the node that the job uses, for energy; None means ``devices``.
            resume_from: Cost of the same job before it was interrupted; the record continues from there.
            interval: Seconds between samples of memory and energy.

        Raises:
            ValueError: A number is out of range.
        """
        if devices < 1 or local_rank < 0 or interval <= 0 or (node_devices is not None and node_devices < 1):
            raise ValueError(
                f"devices={devices} and node_devices={node_devices} must be at least 1, local_rank={local_rank} "
                f"at least 0 and interval={interval} above 0"
            )
        self._device = device
        self._is_cuda = device.split(":")[0] == "cuda"
        self._is_sampler = local_rank == 0
        self._devices = devices if self._is_cuda or self._is_sampler else 0
        self._node_devices = node_devices or devices
        self._earlier = resume_from
        self._interval = interval
        self._flops = 0
        self._samples = 0
        self._peak_rss = 0
        self._final: PhaseCost | None = None
        self._start: float | None = None
        self._counter: EnergyCounter | None = None
        self._stop = threading.Event()
        self._lock = threading.Lock()
        self._thread: threading.Thread | None = None

    def add(self, *, flops: int = 0, samples: int = 0) -> None:
        """Tell the meter about work done, in FLOPs (see `count_flops`) and samples."""
        self._flops += flops
        self._samples += samples

    @property
    def cost(self) -> PhaseCost:
        """The cost so far, what was resumed from included; after the block, the final cost."""
        if self._final is not None:
            return self._final
        this = self._measure()
        return this if self._earlier is None else self._earlier + this

    def __enter__(self) -> "PhaseMeter":
        if self._start is not None:
            raise RuntimeError("a PhaseMeter measures one block; make another for the next")
        self._name = self._device_name()
        if self._is_cuda:
            import torch

            torch.cuda.synchronize(self._device)
            torch.cuda.reset_peak_memory_stats(self._device)
        if self._is_sampler:
            self._counter = open_gpu_counter(self._node_indices()) if self._is_cuda else open_cpu_counter()
            self._energy_start = self._read_counter() or 0.0
            self._sample()
            self._thread = threading.Thread(target=self._run, name="cvlm-cost-sampler", daemon=True)
            self._thread.start()
        self._start = time.perf_counter()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        try:
            # Also after an exception: what was spent was spent, and a resumed run continues from it.
            self._final = self.cost
        finally:
            self._stop.set()
            if self._thread is not None:
                self._thread.join()

    def _measure(self) -> PhaseCost:
        if self._start is None:
            raise RuntimeError("the PhaseMeter has not been entered: read `cost` inside or after its with block")
        if self._is_cuda and self._final is None:
            self._synchronize()
        seconds = time.perf_counter() - self._start
        joules, measured = self._energy(seconds)
        return PhaseCost(
            flops=self._flops,
            seconds=seconds,
            device_seconds=seconds * self._devices,
            energy_joules=joules,
            energy_source="measured" if measured else "estimated",
            peak_memory_bytes=self._peak_memory(),
            samples=self._samples,
            device=self._name,
        )

    def _energy(self, seconds: float) -> tuple[float | None, bool]:
        if not self._is_sampler:
            return 0.0, True  # counted by local rank 0, so nothing of this zero is an estimate
        with self._lock:
            now = self._read_counter()
        if now is not None:
            return now - self._energy_start, True
        watts = assumed_watts(self._name, self._node_devices, is_cpu=self._device.split(":")[0] == "cpu")
        return (None if watts is None else watts * seconds), False

    def _read_counter(self) -> float | None:
        if self._counter is None:
            return None
        try:
            return self._counter.read()
        except OSError as error:
            # Better an honest estimate of the whole phase than a measurement of half of it.
            logger.warning("the energy counter failed, energy will be estimated: %s", error)
            self._counter = None
            return None

    def _peak_memory(self) -> int:
        if self._is_cuda:
            import torch

            return int(torch.cuda.max_memory_allocated(self._device))
        if self._is_sampler:
            self._sample()
        return self._peak_rss

    def _synchronize(self) -> None:
        import torch

        try:
            torch.cuda.synchronize(self._device)
        except RuntimeError as error:
            # After a CUDA fault nothing works any more; the time and the counted work are still worth keeping.
            logger.warning("the device did not finish its work: %s", error)

    def _run(self) -> None:
        while not self._stop.wait(self._interval):
            self._sample()

    def _sample(self) -> None:
        with self._lock:
            self._read_counter()  # keeps track of counters that wrap around
            if not self._is_cuda:
                self._peak_rss = max(self._peak_rss, _resident_bytes())

    def _device_name(self) -> str:
        if self._is_cuda:
            import torch

            return torch.cuda.get_device_name(self._device)
        return cpu_model() if self._device.split(":")[0] == "cpu" else self._device

    def _node_indices(self) -> list[int]:
        import torch

        index = torch.device(self._device).index
        own = torch.cuda.current_device() if index is None else index
        return [own] if self._node_devices == 1 else list(range(self._node_devices))


def _resident_bytes() -> int:
    """Resident memory of this process and all its children, in bytes."""
    import psutil

    own = psutil.Process()
    total = 0
    for process in [own, *own.children(recursive=True)]:
        try:
            total += process.memory_info().rss
        except psutil.Error:
            continue  # a worker ended between the listing and the look
    return total
