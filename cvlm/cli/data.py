"""`cvlm data import | inspect | verify`."""

import argparse
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from cvlm.data.shard_index import FolderIndex


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
    load.add_argument("--shard-samples", type=int, default=512, help="pictures per shard")
    load.add_argument("--workers", type=int, help="processes (default: one per core)")
    load.add_argument("--quiet", action="store_true", help="no progress bar")

    inspect = actions.add_parser("inspect", help="counts, splits, answer coverage, lengths, a contact sheet")
    inspect.add_argument("folder", type=Path, help="imported data")
    inspect.add_argument("--sheet", type=Path, help="file of the contact sheet (default: FOLDER/contact-sheet.png)")

    verify = actions.add_parser("verify", help="checksums, decodability, duplicates, overlap between splits")
    verify.add_argument("folder", type=Path, help="imported data")
    verify.add_argument("--quiet", action="store_true", help="no progress bar")


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
        min_count=arguments.min_count,
        shard_samples=arguments.shard_samples,
        workers=arguments.workers,
    )
    index = import_data(arguments.format, arguments.source, arguments.out, settings, console.bar("pictures"))
    _show_splits(console, index)
    console.say(f"\nwritten to {arguments.out}; in a recipe: data: {{kind: shards, path: {arguments.out}}}")


def _show_splits(console: Any, index: "FolderIndex") -> None:
    what = "questions" if index.task == "vqa" else "captions"
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


ACTIONS: dict[str, Callable[[argparse.Namespace], None]] = {"import": import_shards}
