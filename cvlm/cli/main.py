"""The command `cvlm`. Arguments are parsed without torch; a command imports what it needs when it runs."""

import argparse
import logging
import os
import sys
import warnings
from collections.abc import Sequence
from pathlib import Path

from cvlm.cli.data import add_data_parser
from cvlm.errors import CvlmError


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line; returns the exit code: 0, or 2 for a mistake in what the user gave."""
    arguments = _parse(argv)
    _quieten()
    from cvlm.cli import commands
    from distill.errors import DistillError

    try:
        commands.COMMANDS[arguments.command](arguments)
    except (CvlmError, DistillError) as error:
        print(f"cvlm {arguments.command}: {error}", file=sys.stderr)
        return 2
    except BrokenPipeError:  # whoever read the tables has seen enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    except KeyboardInterrupt:
        print(f"cvlm {arguments.command}: interrupted; the same command goes on from here", file=sys.stderr)
        return 130
    return 0


def _parse(argv: Sequence[str] | None) -> argparse.Namespace:
    """Parse; key=value overrides may stand anywhere behind the recipe, also after options."""
    parser = _parser()
    words = list(sys.argv[1:] if argv is None else argv)
    if words[:2] == ["bench", "compare"]:  # the comparison reads as a part of bench; a model named so is ./compare
        del words[0]
    arguments, rest = parser.parse_known_args(words)
    misplaced = [item for item in rest if "=" not in item or item.startswith("-")]
    if misplaced or (rest and not hasattr(arguments, "overrides")):
        parser.error(f"unrecognized arguments: {' '.join(misplaced or rest)}")
    if rest:
        arguments.overrides += rest
    return arguments


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="cvlm",
        description="Stitch pretrained encoders into a task-specific vision-language model, distil a teacher into it, "
        "and account what it cost.",
    )
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")

    build = commands.add_parser("build", help="compose a model, save it, print its size table")
    build.add_argument("--vision", required=True, help="vision encoder, such as timm:vit_base_patch16_224")
    build.add_argument("--text", required=True, help="text encoder, such as hf:roberta-base")
    build.add_argument("--task", required=True, help="such as vqa or retrieval; cvlm list tasks shows all")
    build.add_argument("--out", required=True, type=Path, help="folder for the model")
    build.add_argument("--fusion", default="co_attention", help="co_attention, merged, cross or none")
    build.add_argument("--width", type=int, default=256, help="width of the fusion module")
    build.add_argument("--depth", type=int, default=2, help="layers of the fusion module")
    build.add_argument("--heads", type=int, default=4, help="attention heads")
    build.add_argument("--answers", type=Path, help="answers (vqa) or words (captioning): one per line, or JSON")
    build.add_argument("--seed", type=int, default=0, help="of the random initial weights")
    build.add_argument("--standalone", action="store_true", help="store frozen encoders too, not only their names")

    run = commands.add_parser("run", help="every phase of a recipe, evaluation, cost, report; resumes")
    _add_recipe(run)
    run.add_argument("--out", required=True, type=Path, help="run folder")
    run.add_argument("--quiet", action="store_true", help="no progress bars")

    train = commands.add_parser("train", help="one phase of a recipe; under torchrun on several processes")
    _add_recipe(train)
    train.add_argument("--phase", required=True, help="a phase of the recipe, such as teacher, finetune or distill")
    train.add_argument("--out", required=True, type=Path, help="run folder; earlier phases must stand in it")
    train.add_argument("--seed", type=int, help="one of the recipe's seeds (default: the first)")
    train.add_argument("--quiet", action="store_true", help="no progress bars")

    targets = commands.add_parser("targets", help="what a teacher says, stored: build, verify, inspect")
    action = targets.add_subparsers(dest="action", required=True, metavar="ACTION")
    store = action.add_parser("build", help="ask a recipe's teacher all that cvlm run will, and train no student")
    _add_recipe(store)
    store.add_argument("--out", required=True, type=Path, help="run folder; cvlm run of the same recipe goes on in it")
    store.add_argument("--quiet", action="store_true", help="no progress bars")
    for name, what in (("verify", "complete, whole, and of this teacher"), ("inspect", "sizes, entropy, agreement")):
        action.add_parser(name, help=what).add_argument("run", type=Path, help="run folder")

    add_data_parser(commands)

    bench = commands.add_parser("bench", help="score any model; bench compare: two results")
    bench.add_argument("model", help="model folder, hub name, hf:NAME, open_clip:MODEL/WEIGHTS or module:callable")
    bench.add_argument("--data", required=True, help="a data kind such as easy_vqa, or a folder with test.jsonl")
    bench.add_argument("--task", help="one that the model serves; needed where it serves several")
    bench.add_argument("--split", default="test", help="train or test")
    bench.add_argument(
        "--rerank",
        type=_number_or_all,
        help="retrieval candidates per query that a matching head re-scores, or all (default: 16)",
    )
    bench.add_argument("--folds", type=int, help="rank retrieval within so many parts of the split (default: 1)")
    bench.add_argument(
        "--exhaustive-sample",
        type=int,
        metavar="QUERIES",
        help="retrieval queries whose every candidate is re-scored too, to show what --rerank leaves out; 0 for none "
        "(default: 64)",
    )
    bench.add_argument("--device", default="cpu", help="where to run, such as cuda")
    bench.add_argument(
        "--allow-contaminated", action="store_true", help="score also what the model was trained on, with a stamp"
    )
    bench.add_argument("--out", type=Path, help="result file (JSON); an interrupted benchmark goes on")
    bench.add_argument("--quiet", action="store_true", help="no progress bars")

    compare = commands.add_parser("compare", help="the same as bench compare: the paired difference of two results")
    compare.add_argument("first", type=Path, metavar="A.json", help="result file of cvlm bench --out")
    compare.add_argument("second", type=Path, metavar="B.json", help="another one, of the same data and split")
    compare.add_argument("--out", type=Path, help="comparison file (JSON)")

    cost = commands.add_parser("cost", help="the cost ledger of a run beside published pretraining")
    cost.add_argument("run", type=Path, help="run folder")

    report = commands.add_parser("report", help="write report.html and arms.png of a run again")
    report.add_argument("run", type=Path, help="run folder")

    doctor = commands.add_parser("doctor", help="what works here, what is missing, how a pair and a teacher meet")
    doctor.add_argument("--vision", help="vision encoder to try")
    doctor.add_argument("--text", help="text encoder to try")
    doctor.add_argument("--teacher", help="teacher to align the pair with: a folder, or hf: and a hub name")
    doctor.add_argument("--kind", help="kind of the teacher, where its configuration does not tell")
    doctor.add_argument("--image", type=Path, help="picture to try with (default: a drawn one)")
    doctor.add_argument("--sentence", help="sentence to try with (default: four)")

    listing = commands.add_parser("list", help="what there is to choose from")
    listing.add_argument("what", choices=("encoders", "fusions", "objectives", "teachers", "tasks", "formats"))
    return parser


def _add_recipe(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("recipe", type=Path, help="recipe file (YAML)")
    parser.add_argument("overrides", nargs="*", metavar="key=value", help="values that replace the recipe's")


def _number_or_all(text: str) -> int | str:
    return "all" if text == "all" else int(text)


def _quieten() -> None:
    """Keep libraries from printing over the progress bars; set CVLM_LOG=INFO to hear them."""
    level = os.environ.get("CVLM_LOG", "ERROR").upper()
    logging.basicConfig(level=level, format="%(levelname)s %(name)s: %(message)s")
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", level.lower())
    logging.getLogger("DeepSpeed").addFilter(lambda record: record.levelno >= logging.getLevelName(level))
    os.environ.setdefault("HF_HUB_VERBOSITY", level.lower())
    os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    if level == "ERROR":
        warnings.filterwarnings("ignore")


if __name__ == "__main__":
    sys.exit(main())
