"""Plain tables of a cost ledger, for whoever draws them."""

from typing import Any

UNKNOWN = "-"


def phase_table(cost: dict[str, Any]) -> list[list[str]]:
    """Phases and their total as text.

    Args:
        cost: Content of a cost.json.

    Returns:
        A header row, one row per phase, and a row "total". An estimated energy is marked "(estimated)".
    """
    header = ["phase", "FLOPs", "time", "device-hours", "energy", "peak memory", "samples"]
    rows = [*cost["phases"].items(), ("total", cost["total"])]
    return [header, *([name, *_phase_cells(record)] for name, record in rows)]


def baseline_table(cost: dict[str, Any]) -> list[list[str]]:
    """Baselines as text.

    Args:
        cost: Content of a cost.json.

    Returns:
        A header row and one row per baseline. Ratios are this run / baseline.
    """
    header = ["baseline", "kind", "device-hours", "FLOPs", "ratio of FLOPs", "ratio of device-hours"]
    return [header, *(_baseline_cells(row) for row in cost["baselines"])]


def _phase_cells(record: dict[str, Any]) -> list[str]:
    return [
        human_flops(record["flops"]),
        human_seconds(record["seconds"]),
        _digits(record["device_seconds"] / 3600),
        human_energy(record["energy_joules"], record["energy_source"]),
        human_bytes(record["peak_memory_bytes"]),
        f"{record['samples']:,}",
    ]


def _baseline_cells(row: dict[str, Any]) -> list[str]:
    return [
        row["name"],
        row["kind"],
        _digits(row["device_hours"]),
        UNKNOWN if row["flops"] is None else human_flops(row["flops"]),
        human_ratio(row["ratio_flops"]),
        human_ratio(row["ratio_device_hours"]),
    ]


def human_flops(flops: float) -> str:
    """FLOPs with a decimal prefix: ``3.2 TFLOP``; from 1e21 on in powers of ten."""
    return _scaled(flops, "FLOP") if flops < 1e21 else f"{flops:.2g} FLOP"


def human_bytes(count: float) -> str:
    """Bytes with a binary prefix: ``1.5 GiB``."""
    for unit, size in (("TiB", 2**40), ("GiB", 2**30), ("MiB", 2**20), ("KiB", 2**10)):
        if count >= size:
            return f"{_digits(count / size)} {unit}"
    return f"{count:.0f} B"


def human_seconds(seconds: float) -> str:
    """Wall time: ``42 s``, ``3 min 20 s``, ``5 h 07 min``."""
    if seconds < 60:
        return f"{seconds:.3g} s"
    minutes, rest = divmod(round(seconds), 60)
    if minutes < 60:
        return f"{minutes} min {rest:02d} s"
    return f"{minutes // 60} h {minutes % 60:02d} min"


def human_energy(joules: float | None, source: str) -> str:
    """Energy in watt-hours: ``12 Wh (estimated)``; ``-`` where it is unknown."""
    if joules is None:
        return UNKNOWN
    mark = " (estimated)" if source == "estimated" else ""
    return f"{_scaled(joules / 3600, 'Wh')}{mark}"


def human_ratio(ratio: float | None) -> str:
    """A share as percent: ``6.4 %``; very small ones in powers of ten."""
    if ratio is None:
        return UNKNOWN
    return f"{ratio:,.0%}".replace("%", " %") if ratio >= 0.1 else f"{ratio * 100:.2g} %"


def _digits(value: float) -> str:
    """Three digits where there is a fraction, and never "1e+03" just below the next prefix."""
    return f"{value:,.0f}" if value >= 100 else f"{value:.3g}"


def _scaled(value: float, unit: str) -> str:
    for prefix, size in (("E", 1e18), ("P", 1e15), ("T", 1e12), ("G", 1e9), ("M", 1e6), ("k", 1e3)):
        if value >= size:
            return f"{_digits(value / size)} {prefix}{unit}"
    return f"{_digits(value)} {unit}"
