"""One function per command; each takes the parsed arguments."""

import argparse
import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
import transformers
from torch import nn

from benchmarks.result_files import compare_results, write_result
from benchmarks.runner import evaluate
from cvlm.api import build as build_model
from cvlm.cli.console import Console
from cvlm.cli.data import data
from cvlm.cli.doctor import doctor
from cvlm.cli.experiment import Experiment
from cvlm.cli.run import RANK, Run
from cvlm.cli.targets import targets
from cvlm.config import load_recipe
from cvlm.data import DATA_KINDS
from cvlm.data.importers import DESCRIPTIONS
from cvlm.encoders import TEXT_SCHEMES, VISION_SCHEMES
from cvlm.errors import CvlmError
from cvlm.model import CVLM, save_model
from cvlm.report import baseline_table, comparison_table, cost_table, result_table, write_report
from cvlm.report.files import read_json
from cvlm.tasks import TASKS
from distill import OBJECTIVES
from distill.teachers import GIVES
from fusion import BLOCKS

transformers.utils.logging.disable_progress_bar()

NO_FUSION = "Two towers that meet in a shared space (CLIP): the projections alone."


def build(arguments: argparse.Namespace) -> None:
    """Compose a model, save it, and print its size table."""
    torch.manual_seed(arguments.seed)
    model = build_model(
        vision=arguments.vision,
        text=arguments.text,
        task=arguments.task,
        fusion={key: getattr(arguments, key) for key in ("width", "depth", "heads")} | {"kind": arguments.fusion},
        answers=_read_answers(arguments.answers) if arguments.answers is not None else (),
    )
    save_model(model, arguments.out, standalone=arguments.standalone)
    Console().table("Parameters", ("part", "all", "trained"), _size_rows(model))
    print(f"\nsaved to {arguments.out}; nothing in it is trained yet beyond the encoders")


def run(arguments: argparse.Namespace) -> None:
    """Run a recipe and print its tables."""
    console = Console(quiet=arguments.quiet)
    recipe = load_recipe(arguments.recipe, arguments.overrides)
    metrics = Run(Experiment(recipe=recipe, out=arguments.out, console=console)).execute()
    results, comparisons = result_table(metrics), comparison_table(metrics)
    title = f"Results: {metrics['task']}, {metrics['split']} split, n = {metrics['n']}"
    console.table(title, results.header, results.rows)
    console.table("Differences", comparisons.header, comparisons.rows)
    _print_cost(console, arguments.out)
    for line in metrics["verdicts"]:
        console.say(line)
    names = ("report.html", "arms.png", "metrics.json", "cost.json", "recipe.yaml", "environment.json")
    console.say("\nWhere things are")
    for name in names:
        console.say(f"  {arguments.out / name}")
    console.say(f"  {arguments.out}/ARM: the trained models, for cvlm.CVLM.from_pretrained and cvlm bench")


def train(arguments: argparse.Namespace) -> None:
    """Run one phase of a recipe."""
    recipe = load_recipe(arguments.recipe, arguments.overrides)
    seed = arguments.seed if arguments.seed is not None else recipe.seeds[0]
    experiment = Experiment(recipe=recipe, out=arguments.out, console=Console(arguments.quiet))
    folder = Run(experiment).execute_phase(arguments.phase, seed)
    if RANK == 0:
        print(f"saved to {folder}")


def bench(arguments: argparse.Namespace) -> None:
    """Score a model and print its metrics."""
    console = Console(quiet=arguments.quiet)
    result = evaluate(
        arguments.model,
        data=arguments.data,
        task=arguments.task,
        split=arguments.split,
        rerank=arguments.rerank,
        folds=arguments.folds,
        exhaustive_sample=arguments.exhaustive_sample,
        device=arguments.device,
        allow_contaminated=arguments.allow_contaminated,
        progress=console.bar("scoring"),
        out=arguments.out,
    )
    rows = [
        (name, f"{metric['mean']:.4f}", f"{metric['ci95'][0]:.4f} .. {metric['ci95'][1]:.4f}")
        for name, metric in result["metrics"].items()
    ]
    console.table(f"{result['data']}, {result['split']} split, n = {result['n']}", ("metric", "value", "95 %"), rows)
    console.say(f"\ncontamination: {_stamp_line(result['contamination'])}")
    if arguments.out is not None:
        console.say(f"\nwritten to {arguments.out}")


def compare(arguments: argparse.Namespace) -> None:
    """Compare two results of `bench` and print the paired differences."""
    console = Console()
    result = compare_results(arguments.first, arguments.second)
    rows = []
    for name, metric in result["metrics"].items():
        low, high = metric["ci95"]
        means = (f"{metric['first']:.4f}", f"{metric['second']:.4f}", f"{metric['difference']:+.4f}")
        rows.append((name, *means, f"{low:+.4f} .. {high:+.4f}", f"{metric['p_value']:.4f}"))
    header = ("metric", "A", "B", "A - B", "95 %", "p")
    console.table(f"{result['data']}, {result['split']} split, n = {result['n']}", header, rows)
    console.say(result["verdict"])
    if arguments.out is not None:
        write_result(result, arguments.out)
        console.say(f"\nwritten to {arguments.out}")


def cost(arguments: argparse.Namespace) -> None:
    """Print the ledger of a run."""
    _print_cost(Console(), arguments.run)


def report(arguments: argparse.Namespace) -> None:
    """Write a run's report again."""
    print(write_report(arguments.run))


def show_list(arguments: argparse.Namespace) -> None:
    """Print a table of names."""
    console = Console()
    if arguments.what == "objectives":
        console.table("Objectives", ("name", "of the student", "of the teacher", "source"), _objective_rows())
    elif arguments.what == "encoders":
        rows3 = [("vision", name, scheme.example) for name, scheme in VISION_SCHEMES.items()]
        rows3 += [("text", name, scheme.example) for name, scheme in TEXT_SCHEMES.items()]
        console.table("Encoders", ("tower", "scheme", "example"), rows3)
    else:
        fusions = {
            kind: (block.__doc__ or "").split("\n")[0] if block is not None else NO_FUSION
            for kind, block in BLOCKS.items()
        }
        formats = DATA_KINDS | {f"cvlm data import {name}": what for name, what in DESCRIPTIONS.items()}
        tasks = {name: facts.what for name, facts in TASKS.items()}
        tables = {"fusions": fusions, "teachers": GIVES, "tasks": tasks, "formats": formats}
        console.table(arguments.what.capitalize(), ("name", "what"), sorted(tables[arguments.what].items()))


def _stamp_line(stamp: str | dict[str, Any]) -> str:
    """Say in one line what is known about training on the scored split."""
    if isinstance(stamp, str):
        return f"{stamp}; nobody recorded what the model was trained on"
    line = f"{stamp['verdict'].upper() if stamp['verdict'] == 'contaminated' else stamp['verdict']}"
    line += f"; {stamp['pictures']:,} pictures and {stamp['texts']:,} texts of the split stand in the training data"
    if stamp["looks"]:
        line += f"; {stamp['looks']:,} pictures look like one by a coarse hash, which simple pictures share"
    return line


def _print_cost(console: Console, folder: Path) -> None:
    ledger = read_json(folder, "cost.json")
    phases, baselines = cost_table(ledger), baseline_table(ledger)
    console.table("Cost", phases.header, phases.rows)
    rows = [(row[0], *row[2:5]) for row in baselines.rows]
    title = "Beside published pretraining (sources and assumptions: report.html)"
    console.table(title, (baselines.header[0], *baselines.header[2:5]), rows)
    console.say()


def _objective_rows() -> Sequence[tuple[str, ...]]:
    rows = []
    for name, kind in OBJECTIVES.items():
        example = kind()
        missing = example.missing(frozenset(), frozenset())
        needs = (", ".join(sorted(missing[side])) or "-" for side in ("student", "teacher"))
        rows.append((name, *needs, kind.source))
    return rows


def _size_rows(model: CVLM) -> Sequence[tuple[str, ...]]:
    every = (model.answer_head, model.embedding_head, model.matching_head, model.decoder)
    heads = nn.ModuleList(head for head in every if head is not None)
    parts = {"vision encoder": model.vision, "text encoder": model.text, "fusion": model.fusion, "heads": heads}
    rows = []
    for name, part in {**parts, "total": model}.items():
        everything = sum(parameter.numel() for parameter in part.parameters())
        trained = sum(parameter.numel() for parameter in part.parameters() if parameter.requires_grad)
        rows.append((name, f"{everything:,}", f"{trained:,}"))
    return rows


def _read_answers(path: Path) -> tuple[str, ...]:
    try:
        text = path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise CvlmError(f"cannot read the answers {path}: {error}") from error
    if not text.lstrip().startswith("["):
        return tuple(line.strip() for line in text.splitlines() if line.strip())
    try:
        return tuple(str(answer) for answer in json.loads(text))
    except ValueError as error:
        raise CvlmError(f"{path} is not a JSON list: {error}") from error


COMMANDS: dict[str, Callable[[argparse.Namespace], None]] = {
    "build": build,
    "run": run,
    "train": train,
    "targets": targets,
    "data": data,
    "bench": bench,
    "compare": compare,
    "cost": cost,
    "report": report,
    "doctor": doctor,
    "list": show_list,
}
