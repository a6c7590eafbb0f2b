"""How numbers are written for a reader. A value that was not measured is a dash, never a zero."""

from typing import Any

MISSING = "-"


def percent(value: float | None) -> str:
    """Write a fraction as ``41.2 %``."""
    return MISSING if value is None else f"{100 * value:.1f} %"


def percent_range(low: float, high: float) -> str:
    """Write two fractions as ``40.1 to 42.3 %``."""
    return f"{100 * low:.1f} to {100 * high:.1f} %"


def points(value: float) -> str:
    """Write a difference of fractions as ``+1.23``, in hundredths."""
    return f"{100 * value:+.2f}"


def scientific(value: float | None) -> str:
    """Write a count such as FLOPs as ``1.23e+15``."""
    return MISSING if value is None else f"{value:.3g}" if abs(value) < 1e4 else f"{value:.2e}"


def whole(value: float | None) -> str:
    """Write a count as ``12,345``."""
    return MISSING if value is None else f"{value:,.0f}"


def duration(seconds: float | None) -> str:
    """Write seconds in the unit that suits them."""
    if seconds is None:
        return MISSING
    for unit, size in (("h", 3600.0), ("min", 60.0)):
        if seconds >= size:
            return f"{seconds / size:.1f} {unit}"
    return f"{seconds:.1f} s"


def energy(joules: float | None, source: str | None) -> str:
    """Write joules as watt-hours, with the source: ``1.4 Wh (measured)``."""
    if joules is None:
        return MISSING
    amount = f"{joules / 3.6e6:.2f} kWh" if joules >= 3.6e6 else f"{joules / 3600:.2g} Wh"
    return f"{amount} ({source})" if source else amount


def gibibytes(count: float | None) -> str:
    """Write bytes as ``1.25 GiB``."""
    return MISSING if count is None else f"{count / 2**30:.2f} GiB"


def ratio(value: float | None) -> str:
    """Write a ratio as ``2.4``, one far below as ``1/12,300``, which is how people say it."""
    if value is None:
        return MISSING
    if 0 < value < 0.1:
        return f"1/{float(f'{1 / value:.3g}'):,.0f}"
    return f"{value:,.0f}" if value >= 100 else f"{value:.2g}"


def p_value(value: float | None) -> str:
    """Write a p-value; below 0.001 the number itself says nothing more."""
    if value is None:
        return MISSING
    return "< 0.001" if value < 0.001 else f"{value:.2g}"


def any_value(value: Any) -> str:
    """Write a value whose kind is not known beforehand: the environment's, a baseline's assumptions."""
    if value is None:
        return MISSING
    if isinstance(value, (list, tuple)):
        return ", ".join(any_value(item) for item in value)
    if isinstance(value, dict):
        return ", ".join(f"{key}: {any_value(item)}" for key, item in value.items())
    return str(value)
