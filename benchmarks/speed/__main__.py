"""`python -m benchmarks.speed`: measure, print, and write one JSON file per kind of work."""

import argparse
from collections.abc import Callable
from pathlib import Path
from typing import Any

from benchmarks.result_files import write_result
from benchmarks.speed import fusion_retrieval, import_shards, reading, recall, vqa


def main() -> None:
    """Measure what is named, or everything."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.speed", description=__doc__)
    parser.add_argument("what", nargs="*", help="vqa, recall, fusion_retrieval, import or reading (default: all)")
    parser.add_argument("--out", type=Path, default=Path("benchmarks/results/speed"), help="folder of the JSON files")
    parser.add_argument("--repeats", type=int, default=3, help="how often each way is timed")
    parser.add_argument("--questions", type=int, default=vqa.QUESTIONS, help="of vqa")
    parser.add_argument("--images", type=int, default=recall.IMAGES, help="of recall; each has five texts")
    parser.add_argument("--fusion-images", type=int, default=fusion_retrieval.IMAGES, help="of fusion_retrieval")
    parser.add_argument("--epochs", type=int, default=fusion_retrieval.EPOCHS, help="of fusion_retrieval's model")
    parser.add_argument("--pictures", type=int, default=import_shards.PICTURES, help="of import")
    parser.add_argument("--samples", type=int, default=reading.SAMPLES, help="of reading")
    arguments = parser.parse_args()
    works: dict[str, Callable[[], dict[str, Any]]] = {
        "vqa": lambda: vqa.compare(arguments.questions, arguments.repeats),
        "recall": lambda: recall.compare(arguments.images, repeats=arguments.repeats),
        "fusion_retrieval": lambda: fusion_retrieval.compare(
            arguments.fusion_images, epochs=arguments.epochs, repeats=min(arguments.repeats, 2)
        ),
        "import": lambda: import_shards.compare(arguments.pictures, arguments.repeats),
        "reading": lambda: reading.compare(arguments.samples, arguments.repeats),
    }
    unknown = sorted(set(arguments.what) - set(works))
    if unknown:
        parser.error(f"unknown work {', '.join(unknown)}; there is {', '.join(works)}")
    for name in arguments.what or works:
        measured = works[name]()
        write_result(measured, arguments.out / f"{name}.json")
        print(f"{name}: {_summary(measured)}", flush=True)


def _summary(measured: dict[str, Any]) -> str:
    times = measured["times_faster"]
    text = f"{times['median']:.1f}x faster ({times['min']:.1f} to {times['max']:.1f})"
    if "memory_share" in measured:
        text += f", {measured['memory_share']:.3f} of the peak memory"
    if "recall_difference" in measured:
        text += f", at most {max(map(abs, measured['recall_difference'].values())):.4f} of recall away"
    return f"{text} than {measured['beside']}"


if __name__ == "__main__":
    main()
