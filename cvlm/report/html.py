"""The page of a run: one file with its picture inside, that opens anywhere and loads nothing."""

import base64
from html import escape
from importlib.resources import files
from pathlib import Path
from string import Template
from typing import Any

from cvlm.files import write_atomic
from cvlm.report import tables
from cvlm.report.arms import draw_arms
from cvlm.report.files import read_json, read_text
from cvlm.report.tables import Table
from cvlm.report.terms import term_table


def write_report(run_dir: Path | str) -> Path:
    """Write arms.png and report.html into a run folder and return the page's path.

    Reads metrics.json, cost.json, environment.json, recipe.yaml and, as far as there are any, the arms' logs.

    Raises:
        CvlmError: If one of the four is missing or broken, with its name.
    """
    run_dir = Path(run_dir)
    metrics, cost, environment = (read_json(run_dir, f"{name}.json") for name in ("metrics", "cost", "environment"))
    recipe = read_text(run_dir, "recipe.yaml")
    picture = run_dir / "arms.png"
    draw_arms(metrics, cost, picture)
    page = Template(files("cvlm.report").joinpath("page.html").read_text(encoding="utf-8")).substitute(
        title=escape(f"CVLM report: {run_dir.resolve().name}"),
        summary=escape(_summary(metrics)),
        verdict=escape(str(metrics.get("verdict") or "No comparison was made.")),
        picture=base64.b64encode(picture.read_bytes()).decode("ascii"),
        description=escape(_description(tables.result_table(metrics))),
        results="\n".join(_table(tables.result_table(metrics, name)) for name in _metrics_in_order(metrics)),
        comparisons=_table(tables.comparison_table(metrics)),
        terms=_table(term_table(run_dir, list(metrics["arms"]))),
        cost=_table(tables.cost_table(cost)),
        baselines=_baselines(tables.baseline_table(cost)),
        environment=_table(tables.environment_table(environment), words_from=1),
        recipe=escape(recipe),
    )
    path = run_dir / "report.html"
    write_atomic(path, page.encode("utf-8"))
    return path


def _metrics_in_order(metrics: dict[str, Any]) -> list[str]:
    primary = tables.primary_metric(metrics)
    return [primary, *(name for name in tables.metric_names(metrics) if name != primary)]


def _summary(metrics: dict[str, Any]) -> str:
    parts = [f"{key} {metrics[key]}" for key in ("task", "split") if metrics.get(key)]
    if metrics.get("n"):
        parts.append(f"{metrics['n']:,} examples")
    return ", ".join(parts)


def _description(table: Table) -> str:
    """Say in words what the picture shows, for a reader who cannot see it."""
    scores = "; ".join(f"{row[0]} {row[1]}" for row in table.rows)
    return f"{table.header[1]} per arm beside its training FLOPs: {scores}"


def _baselines(table: Table) -> str:
    """Return the baselines' numbers as a table, and their sources and assumptions, which are prose, as a list."""
    if not table.rows:
        return _table(table)
    numbers = Table(header=table.header[:6], rows=tuple(row[:6] for row in table.rows))
    notes = "\n".join(
        f"<dt>{escape(row[0])}</dt>\n<dd>{_linked(row[6])}<br>{escape(row[7])}</dd>" for row in table.rows
    )
    return f"{_table(numbers)}\n<dl>\n{notes}\n</dl>"


def _table(table: Table, words_from: int | None = None) -> str:
    """Return a table as HTML; columns from ``words_from`` on hold prose, which may wrap, and not numbers."""
    if not table.rows:
        return '<p class="none">None.</p>'
    head = "".join(f'<th scope="col">{escape(name)}</th>' for name in table.header)
    body = "\n".join(f"<tr>{_cells(row, words_from)}</tr>" for row in table.rows)
    return f'<div class="scroll"><table>\n<thead><tr>{head}</tr></thead>\n<tbody>\n{body}\n</tbody>\n</table></div>'


def _cells(row: tuple[str, ...], words_from: int | None) -> str:
    first, *rest = row
    cells = [f'<th scope="row">{escape(first)}</th>']
    for column, value in enumerate(rest, start=1):
        words = words_from is not None and column >= words_from
        cells.append(f'<td class="words">{_linked(value)}</td>' if words else f"<td>{escape(value)}</td>")
    return "".join(cells)


def _linked(value: str) -> str:
    """Escape a value, and make a bare web address a link. Anything else, ``javascript:`` included, stays text."""
    if value.startswith(("https://", "http://")) and not any(character.isspace() for character in value):
        return f'<a href="{escape(value)}" rel="noopener noreferrer">{escape(value)}</a>'
    return escape(value)
