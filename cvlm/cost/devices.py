"""Peak speed and power of devices, as their makers or public tables state them.

Peaks are dense, in TFLOP/s, at two FLOPs per multiply-add. ``None`` means that no usable public figure was found or
that the device lacks the format; nothing here is a guess. GeForce cards have no 16-bit figure on purpose: public tables
repeat their shader rate, and a utilisation computed from that reads about twice too high.
"""

import re
from dataclasses import dataclass
from typing import Literal

Precision = Literal["half", "tf32", "fp32"]

_PEAKS = "Lightning-AI/pytorch-lightning src/lightning/fabric/utilities/throughput.py (NVIDIA data sheets)"
_IMPACT = "mlco2/impact data/gpus.csv"

# mlco2/codecarbon codecarbon/external/hardware.py: POWER_CONSTANT, its default for an unknown CPU, and
# CONSUMPTION_PERCENTAGE_CONSTANT, the share of it that is drawn on average.
CPU_WATTS = 85.0
CPU_UTILISATION = 0.5

# The upper bound that the ML CO2 Impact calculator (mlco2/impact) uses too: thermal design power at all times.
GPU_UTILISATION = 1.0


@dataclass(frozen=True, kw_only=True)
class DeviceSpec:
    """What is publicly stated about one device.

    Attributes:
        name: Key in the table.
        pattern: Regular expression that matches the name torch gives the device.
        half: Peak dense TFLOP/s in bf16 or fp16.
        tf32: Peak dense TFLOP/s in TF32.
        fp32: Peak TFLOP/s in full single precision.
        watts: Thermal design power in watts.
        source: Public source of the figures.
    """

    name: str
    pattern: str
    half: float | None
    tf32: float | None
    fp32: float | None
    watts: float | None
    source: str

    @property
    def family(self) -> str:
        """Chip name without the form factor: ``A100`` for ``A100-SXM``."""
        return self.name.partition("-")[0]

    def peak_flops(self, precision: Precision) -> float | None:
        """Peak dense FLOP/s in the given precision, None where none is stated."""
        tflops: float | None = getattr(self, precision)
        return None if tflops is None else tflops * 1e12


def _spec(
    name: str,
    pattern: str,
    half: float | None,
    tf32: float | None,
    fp32: float | None,
    watts: float | None,
    source: str = f"peaks: {_PEAKS}; watts: {_IMPACT}",
) -> DeviceSpec:
    return DeviceSpec(name=name, pattern=pattern, half=half, tf32=tf32, fp32=fp32, watts=watts, source=source)


# Order matters: the first pattern that matches wins, special form factors before the plain one.
_TABLE = (
    _spec("H200-NVL", r"\bH200 NVL\b", 840.0, 420.0, 60.0, None, f"peaks: {_PEAKS}; watts: none found"),
    _spec(
        "H200-SXM", r"\bH200\b", 989.5, 494.5, 67.0, 700.0,
        f"peaks: {_PEAKS}; watts: MLPerf Inference v4.1, system description H200-SXM-141GBx8",
    ),
    _spec("H100-NVL", r"\bH100 NVL\b", 835.5, 417.5, 60.0, 400.0),
    _spec("H100-PCIe", r"\bH100 PCIe\b", 756.0, 378.0, 51.2, None, f"peaks: {_PEAKS}; watts: none found"),
    _spec("H100-SXM", r"\bH100\b.*\bHBM3\b", 989.5, 494.5, 67.0, 700.0),
    _spec("A100-PCIe", r"\bA100\b.*\bPCIE\b", 312.0, 156.0, 19.5, 250.0),
    _spec("A100-SXM", r"\bA100-SXM", 312.0, 156.0, 19.5, 400.0),
    _spec("V100-PCIe", r"\bV100-PCIE", 112.0, None, 14.0, None, f"peaks: {_PEAKS}; watts: sources disagree"),
    _spec(
        "V100-SXM", r"\bV100-SXM", 125.0, None, 15.7, 300.0,
        f"peaks: {_PEAKS}; watts: {_IMPACT} (32 GB card; it lists 250 W for the 16 GB card)",
    ),
    _spec("L40S", r"\bL40S\b", 362.05, 183.0, None, 350.0, _IMPACT),
    _spec("L4", r"\bL4\b", 121.0, 60.0, 30.3, 72.0),
    _spec("T4", r"\bT4\b", 65.0, None, 8.1, 70.0),
    _spec("RTX3090", r"\bRTX 3090$", None, None, 35.6, 350.0),
    _spec("RTX4090", r"\bRTX 4090$", None, None, 82.6, 450.0),
)  # fmt: skip

DEVICES: dict[str, DeviceSpec] = {spec.name: spec for spec in _TABLE}


def find_device(torch_name: str) -> DeviceSpec | None:
    """Find a device by the name torch gives it (``torch.cuda.get_device_name``).

    A MIG slice is not the device whose name it carries, so it is unknown.

    Args:
        torch_name: Such as ``NVIDIA A100-SXM4-80GB``.

    Returns:
        The entry, or None for a device that is not in the table.
    """
    if re.search(r"\bMIG\b", torch_name):
        return None
    return next((spec for spec in _TABLE if re.search(spec.pattern, torch_name, re.IGNORECASE)), None)
