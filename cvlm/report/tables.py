"""The report's tables as plain strings, so that the page, the terminal and a test read the same thing.

The metrics of metrics.json are fractions; they are shown as percent, differences as points (hundredths).
"""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from cvlm.errors import CvlmError
from cvlm.report import text


@dataclass(frozen=True, kw_only=True)
class Table:
    """A header and rows of strings.

    Attributes:
        header: Column names.
        rows: One tuple a row, as long as the header.
    """

    header: tuple[str, ...]
    rows: tuple[tuple[str, ...], ...]


def primary_metric(metrics: dict[str, Any]) -> str:
    """Return the metric the run is judged by: the one named, else the first of the first arm.

    Raises:
        CvlmError: If there is no arm, or no arm has the metric.
    """
    arms = metrics.get("arms") or {}
    names = metric_names(metrics)
    name = metrics.get("metric") or (names[0] if names else None)
    if name not in names:
        raise CvlmError(f"metrics.json has no arm with the metric {name!r}. Arms: {', '.join(arms) or 'none'}.")
    return str(name)


def metric_names(metrics: dict[str, Any]) -> list[str]:
    """Return every metric of every arm, in the order they first appear."""
    return list(dict.fromkeys(name for scores in (metrics.get("arms") or {}).values() for name in scores))


def result_table(metrics: dict[str, Any], metric: str | None = None, baseline: str = "finetune") -> Table:
    """Return one row per arm: mean, interval, range over seeds, difference from the baseline arm.

    Args:
        metrics: The content of metrics.json.
        metric: The metric to show; the primary one if None.
        baseline: The arm that the last column compares with.
    """
    metric = metric or primary_metric(metrics)
    rows = []
    for arm, scores in metrics["arms"].items():
        if metric in scores:
            score = scores[metric]
            rows.append((arm, text.percent(score["mean"]), *_spread(score), _against(metrics, arm, baseline, metric)))
    header = ("arm", metric, "95 % interval", "per seed", f"points vs {baseline}")
    return Table(header=header, rows=tuple(rows))


def comparison_table(metrics: dict[str, Any]) -> Table:
    """Return one row per comparison of metrics.json, with whether a difference was shown."""
    rows = []
    for name, comparison in (metrics.get("comparisons") or {}).items():
        low, high = comparison["ci95"]
        shown = "not shown" if low <= 0 <= high else "higher" if low > 0 else "lower"
        rows.append(
            (
                name.replace("_vs_", " vs "),
                text.any_value(comparison.get("metric")),
                text.points(comparison["difference"]),
                f"{text.points(low)} to {text.points(high)}",
                text.p_value(comparison.get("p_value")),
                shown,
            )
        )
    return Table(header=("comparison", "metric", "points", "95 % interval", "p", "difference"), rows=tuple(rows))


def cost_table(cost: dict[str, Any]) -> Table:
    """Return one row per phase of cost.json and one for the total."""
    phases = dict(cost.get("phases") or {})
    if cost.get("total"):
        phases["total"] = cost["total"]
    rows = tuple(
        (
            name,
            text.scientific(phase.get("flops")),
            text.duration(phase.get("seconds")),
            text.duration(phase.get("device_seconds")),
            text.energy(phase.get("energy_joules"), phase.get("energy_source")),
            text.gibibytes(phase.get("peak_memory_bytes")),
            text.whole(phase.get("samples")),
        )
        for name, phase in phases.items()
    )
    return Table(header=("phase", "FLOPs", "time", "device time", "energy", "peak memory", "samples"), rows=rows)


def baseline_table(cost: dict[str, Any]) -> Table:
    """Return one row per baseline of cost.json, with its source and what was assumed."""
    rows = tuple(
        (
            text.any_value(baseline.get("name")),
            text.any_value(baseline.get("kind")),
            text.scientific(baseline.get("flops")),
            text.ratio(baseline.get("ratio_flops")),
            text.whole(baseline.get("device_hours")),
            text.ratio(baseline.get("ratio_device_hours")),
            text.any_value(baseline.get("source")),
            text.any_value(baseline.get("assumptions")),
        )
        for baseline in cost.get("baselines") or []
    )
    header = ("baseline", "kind", "FLOPs", "FLOPs ratio", "device hours", "hours ratio", "source", "assumptions")
    return Table(header=header, rows=rows)


def environment_table(environment: dict[str, Any]) -> Table:
    """Return environment.json as dotted names and values."""
    return Table(header=("name", "value"), rows=tuple(_flat(environment)))


def _spread(score: dict[str, Any]) -> tuple[str, str]:
    interval = text.percent_range(*score["ci95"]) if score.get("ci95") else text.MISSING
    seeds = score.get("per_seed") or []
    if len(seeds) > 1:
        return interval, f"{text.percent_range(min(seeds), max(seeds))} ({len(seeds)} seeds)"
    return interval, "1 seed" if seeds else text.MISSING


def _against(metrics: dict[str, Any], arm: str, baseline: str, metric: str) -> str:
    """Return the arm's stored difference from the baseline; a comparison stored the other way round is turned."""
    comparisons = metrics.get("comparisons") or {}
    for name, sign in ((f"{arm}_vs_{baseline}", 1), (f"{baseline}_vs_{arm}", -1)):
        if name in comparisons and comparisons[name].get("metric", metric) == metric:
            low, high = sorted(sign * bound for bound in comparisons[name]["ci95"])
            difference = sign * comparisons[name]["difference"]
            return f"{text.points(difference)} ({text.points(low)} to {text.points(high)})"
    return text.MISSING


def _flat(value: dict[str, Any], prefix: str = "") -> Iterator[tuple[str, str]]:
    for key, item in value.items():
        if isinstance(item, dict) and item:
            yield from _flat(item, f"{prefix}{key}.")
        else:
            yield f"{prefix}{key}", text.any_value(item)
