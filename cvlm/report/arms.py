"""The picture of a run: what each arm scores, beside what it costs to train."""

import io
from pathlib import Path
from typing import TYPE_CHECKING, Any

from cvlm.files import write_atomic
from cvlm.report.tables import primary_metric

if TYPE_CHECKING:
    from matplotlib.axes import Axes

# Okabe and Ito's colours, told apart with every common colour blindness, and in grey by their lightness.
_SCORE, _SEED, _COST, _INK = "#0072B2", "#E69F00", "#009E73", "#222222"


def draw_arms(metrics: dict[str, Any], cost: dict[str, Any], path: Path | str) -> None:
    """Draw arms.png, 1600 pixels wide: score with 95% interval and seeds on the left, training FLOPs on the right.

    The cost of an arm is that of the phase of the same name, summed over its seeds: ``distill`` counts the
    distillation alone and not the phases before it. An arm without such a phase, such as the majority answer, has no
    marker.

    Args:
        metrics: The content of metrics.json.
        cost: The content of cost.json.
        path: The PNG file to write.

    Raises:
        CvlmError: If no arm has the primary metric.
    """
    # The Figure is used directly: pyplot would keep it alive, and would choose a backend for the whole process.
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    metric = primary_metric(metrics)
    arms = {arm: scores[metric] for arm, scores in metrics["arms"].items() if metric in scores}
    # About 700 pixels for the usual four arms; more arms get more room instead of smaller letters.
    figure = Figure(figsize=(16, max(7.0, 1.5 + 1.1 * len(arms))), dpi=100, layout="constrained", facecolor="white")
    figure.get_layout_engine().set(w_pad=0.15, h_pad=0.1)  # type: ignore[union-attr, call-arg]
    canvas = FigureCanvasAgg(figure)
    left, right = figure.subplots(1, 2, sharey=True, width_ratios=[3, 2])
    _draw_scores(left, arms, metric)
    _draw_costs(right, [_flops(cost, arm) for arm in arms])
    left.set_yticks(range(len(arms)), list(arms), fontsize=18)
    left.set_ylim(len(arms) - 0.4, -0.6)
    figure.suptitle(_title(metrics), fontsize=18, color=_INK)
    stream = io.BytesIO()
    canvas.print_png(stream)
    write_atomic(Path(path), stream.getvalue())


def _draw_scores(axes: "Axes", arms: dict[str, dict[str, Any]], metric: str) -> None:
    rows = range(len(arms))
    means = [100 * score["mean"] for score in arms.values()]
    intervals = [score.get("ci95") or (score["mean"], score["mean"]) for score in arms.values()]
    lows, highs = ([100 * interval[side] for interval in intervals] for side in (0, 1))
    axes.hlines(rows, lows, highs, color=_SCORE, linewidth=4, label="95 % interval")
    axes.plot(means, rows, "o", color=_SCORE, markersize=13, label="mean")
    # Below the interval, where neither hides the other.
    seeds = [
        (100 * value, row + 0.22) for row, score in enumerate(arms.values()) for value in score.get("per_seed") or []
    ]
    axes.scatter(
        [value for value, _ in seeds],
        [row for _, row in seeds],
        s=60,
        marker="D",
        color=_SEED,
        edgecolors=_INK,
        linewidths=0.6,
        label="one seed",
    )
    for row, mean in enumerate(means):
        axes.annotate(
            f"{mean:.1f}", (mean, row), (0, 13), textcoords="offset points", ha="center", fontsize=16, color=_INK
        )
    _finish(axes, f"{metric.replace('_', ' ')} (%)")
    axes.margins(x=0.08)
    axes.figure.legend(
        *axes.get_legend_handles_labels(), loc="outside lower center", ncols=3, frameon=False, fontsize=14
    )


def _draw_costs(axes: "Axes", flops: list[float | None]) -> None:
    known = [value for value in flops if value]
    axes.set_xscale("log")
    # A log axis has no zero, so the marker carries the value and the line only leads the eye. It starts a decade below
    # the cheapest arm; on the right there is room for the numbers.
    low, high = (min(known) / 10, max(known) * 30) if known else (1.0, 10.0)
    axes.set_xlim(low, high)
    for row, value in enumerate(flops):
        if value:
            axes.hlines(row, low, value, color=_COST, linewidth=4, alpha=0.4)
            axes.plot(value, row, "s", color=_COST, markersize=13)
        axes.annotate(
            _power_of_ten(value) if value else "not trained here",
            (value or low, row),
            (14, 0),
            textcoords="offset points",
            va="center",
            fontsize=16,
            color=_INK,
        )
    _finish(axes, "training FLOPs of the arm's phase, all seeds (log)")


def _finish(axes: "Axes", label: str) -> None:
    axes.set_xlabel(label, fontsize=16, color=_INK)
    axes.tick_params(axis="x", labelsize=14)
    axes.tick_params(axis="y", length=0)
    axes.grid(axis="x", color="#DDDDDD")
    axes.set_axisbelow(True)
    axes.spines[["top", "right", "left"]].set_visible(False)


def _flops(cost: dict[str, Any], arm: str) -> float | None:
    phase = (cost.get("phases") or {}).get(arm) or {}
    return phase.get("flops")


def _power_of_ten(value: float) -> str:
    mantissa, exponent = f"{value:.1e}".split("e")
    return rf"${mantissa}\times10^{{{int(exponent)}}}$"


def _title(metrics: dict[str, Any]) -> str:
    parts = [str(metrics[key]) for key in ("task", "split") if metrics.get(key)]
    if metrics.get("n"):
        parts.append(f"{metrics['n']:,} examples")
    # A dollar would open matplotlib's formula mode.
    return ", ".join(parts).replace("$", r"\$")
