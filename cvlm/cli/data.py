"""`cvlm data import | inspect | verify`."""

import argparse
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from cvlm.data.shard_index import FolderIndex
    from cvlm.data.verifying import Overlap


def add_data_parser(commands: Any) -> None:
    """Add the command to the parser; imports nothing heavy."""
    data = commands.add_parser("data", help="official files on disk -> shards with an index; inspect and verify them")
    actions = data.add_subparsers(dest="action", required=True, metavar="ACTION")

    load = actions.add_parser("import", help="import a data set; a stopped import goes on where it was")
    load.add_argument("format", help="such as vqav2 or karpathy; cvlm list formats shows all")
    load.add_argument("source", type=Path, help="folder (or file) with the data set's own files")
    load.add_argument("out", type=Path, help="new folder for the shards")
    load.add_argument("--images", type=Path, help="folder of the pictures, where it is not the usual one")
    load.add_argument("--shortest", type=int, metavar="PIXELS", help="shrink pictures to this shorter side")
    load.add_argument("--longest", type=int, metavar="PIXELS", help="shrink pictures to this longer side")
    load.add_argument(
        "--min-count", type=int, help="how often a training answer must occur (default: 9 from 100,000 questions on)"
    )
    load.add_argument("--columns", nargs="*", default=[], metavar="FIELD=COLUMN", help="column names of your own table")
    load.add_argument("--skip", type=float, default=0.01, help="share of rows and pictures that may be damaged")
    load.add_argument(
        "--check",
        choices=("structure", "decode"),
        default="structure",
        help="how pictures are checked: by the structure of their files, or each by its decoder, several times as slow",
    )
    load.add_argument("--shard-samples", type=int, default=512, help="pictures per shard")
    load.add_argument("--workers", type=int, help="processes (default: one per core)")
    load.add_argument("--quiet", action="store_true", help="no progress bar")

    show = actions.add_parser("inspect", help="counts, splits, answer coverage, lengths, a contact sheet")
    show.add_argument("folder", type=Path, help="imported data")
    show.add_argument("--sheet", type=Path, help="file of the contact sheet (default: FOLDER/contact-sheet.png)")

    check = actions.add_parser("verify", help="checksums, decodability, duplicates, overlap between splits")
    check.add_argument("folder", type=Path, help="imported data")
    check.add_argument(
        "--teacher-data",
        type=Path,
        metavar="OTHER",
        help="a teacher's training data: an import, training_data.json, or a file of picture ids or SHA-256 sums",
    )
    check.add_argument("--quiet", action="store_true", help="no progress bar")


def data(arguments: argparse.Namespace) -> None:
    """Run the chosen action."""
    ACTIONS[arguments.action](arguments)


def import_shards(arguments: argparse.Namespace) -> None:
    """Import a data set and print what came of it."""
    from cvlm.cli.console import Console
    from cvlm.data.importers import ImportOptions
    from cvlm.data.importing import ImportSettings, import_data
    from cvlm.data.pixels import Resize

    console = Console(arguments.quiet)
    wanted = arguments.shortest is not None or arguments.longest is not None
    settings = ImportSettings(
        source=ImportOptions(skip=arguments.skip, images=arguments.images, columns=_columns(arguments.columns)),
        resize=Resize(shortest=arguments.shortest, longest=arguments.longest) if wanted else None,
        check=arguments.check,
        min_count=arguments.min_count,
        shard_samples=arguments.shard_samples,
        workers=arguments.workers,
    )
    index = import_data(arguments.format, arguments.source, arguments.out, settings, console.bar("pictures"))
    _show_splits(console, index)
    console.say(f"\nwritten to {arguments.out}; in a recipe: data: {{kind: shards, path: {arguments.out}}}")


def inspect(arguments: argparse.Namespace) -> None:
    """Print what an import holds, and draw its contact sheet."""
    from cvlm.cli.console import Console
    from cvlm.data.inspecting import contact_sheet, summarise
    from cvlm.data.shard_index import read_folder_index
    from cvlm.errors import CvlmError

    console, index = Console(), read_folder_index(arguments.folder)
    _show_splits(console, index)
    summaries = summarise(arguments.folder)
    rows = [(s.split, f"{s.per_picture:.2f}", *(f"{number}" for number in s.words)) for s in summaries]
    console.table("Words per text", ("split", "texts per picture", "5 %", "median", "95 %", "most"), rows)
    for title, field in (("Question types", "types"), ("Answer types", "answer_types"), ("Answers", "answers")):
        _show_counts(console, title, {s.split: getattr(s, field) for s in summaries})
    console.say(f"\nlicence: {index.licence or 'not stated by the source'}")
    sheet = arguments.sheet if arguments.sheet is not None else arguments.folder / "contact-sheet.png"
    try:
        contact_sheet(arguments.folder).save(sheet, "PNG")
    except OSError as error:
        raise CvlmError(f"cannot write the contact sheet {sheet}: {error.strerror or error}") from error
    console.say(f"contact sheet: {sheet}")


def verify(arguments: argparse.Namespace) -> None:
    """Check an import.

    Raises:
        CvlmError: something is wrong; the text lists the first problems.
    """
    from cvlm.cli.console import Console
    from cvlm.data.verifying import verify as check
    from cvlm.errors import CvlmError

    console = Console(arguments.quiet)
    verdict = check(arguments.folder, console.bar("samples"), arguments.teacher_data)
    _show_overlaps(console, "Pictures in two splits", verdict.overlaps)
    _show_overlaps(console, f"Pictures in {arguments.teacher_data}", verdict.taught)
    if verdict.problems:
        shown = "".join(f"\n  - {problem}" for problem in verdict.problems[:20])
        raise CvlmError(f"{arguments.folder} has {len(verdict.problems)} problem(s); import again{shown}")
    console.say(f"\n{verdict.samples:,} samples are sound: checksums, pictures and ids")


def _show_overlaps(console: Any, title: str, overlaps: "list[Overlap]") -> None:
    if not overlaps:
        return
    rows = [(" / ".join(o.splits), *(f"{count:,}" for count in (o.ids, o.files, o.texts, o.looks))) for o in overlaps]
    console.table(title, ("splits", "same id", "same file", "same text", "look alike"), rows)
    for overlap in overlaps:
        for first, second in overlap.examples:
            console.say(f"  alike: {overlap.splits[0]} {first}, {overlap.splits[1]} {second}")


def _show_counts(console: Any, title: str, counts: dict[str, dict[str, int]], most: int = 10) -> None:
    """Print the share of the most frequent names per split."""
    overall: dict[str, int] = {}
    for found in counts.values():
        for name, number in found.items():
            overall[name] = overall.get(name, 0) + number
    if not overall:
        return
    names = sorted(overall, key=lambda name: (-overall[name], name))[:most]
    totals = {split: max(sum(found.values()), 1) for split, found in counts.items()}
    rows = [(name, *(f"{found.get(name, 0) / totals[split]:.1%}" for split, found in counts.items())) for name in names]
    console.table(f"{title} ({len(overall):,})", ("", *counts), rows)


def _show_splits(console: Any, index: "FolderIndex") -> None:
    what = {"vqa": "questions", "retrieval": "captions"}.get(index.task, "statements")
    rows = []
    for split, shards in index.splits.items():
        numbers = (len(shards), sum(s.samples for s in shards), sum(s.texts for s in shards))
        size = sum(shard.bytes for shard in shards) / 2**20
        rows.append((split, *(f"{number:,}" for number in numbers), f"{size:,.1f} MiB"))
    console.table(
        f"{index.name} ({index.data_format}, {index.task})", ("split", "shards", "samples", what, "size"), rows
    )
    if index.coverage:
        covered = [
            (s, f"{c.answered:,}", f"{c.reachable / max(c.answered, 1):.2%}", f"{c.ceiling:.2%}")
            for s, c in index.coverage.items()
        ]
        title = f"Answer vocabulary: {len(index.answers):,} answers, each {index.min_count}+ times in train"
        console.table(title, ("split", "answered", "reachable", "score ceiling"), covered)
    if index.skipped:
        console.say(f"\n{len(index.skipped)} row(s) or picture(s) were skipped; index.json lists them. The first:")
        for skip in index.skipped[:5]:
            console.say(f"  {skip.key}: {skip.reason}")


def _columns(pairs: list[str]) -> dict[str, str]:
    from cvlm.errors import CvlmError

    columns = {}
    for pair in pairs:
        field, separator, column = pair.partition("=")
        if not separator or not field or not column:
            raise CvlmError(f"--columns {pair!r} must read FIELD=COLUMN, for instance image=file_name")
        columns[field] = column
    return columns


ACTIONS: dict[str, Callable[[argparse.Namespace], None]] = {
    "import": import_shards,
    "inspect": inspect,
    "verify": verify,
}
