"""Does alignment matter? `python -m benchmarks.alignment` trains one student with true maps, random maps, and none.

Teacher and student see the same pairs of easy-VQA through different eyes: other vision network, picture size and patch
grid, other tokenizer, other width and number of heads. Each arm starts from the same student, trained on few labels,
and adds terms over all pairs. Random maps have the shapes and sums of the true ones and stand for other words and other
places.
"""

import argparse
import tempfile
import time
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from benchmarks.alignment.arms import ARMS, STUDENT, TEACHER, TEXT, VOCABULARY, Bench, save_text_encoder
from benchmarks.alignment.measures import METRICS, measure, measure_teacher, run_split
from benchmarks.environment import environment
from benchmarks.result_files import write_result
from benchmarks.statistics import arm_summary, paired_difference, verdict
from cvlm.config import EasyVqaData
from cvlm.data import load_data
from cvlm.model import CVLM
from distill import Signal

COMPARED = (
    ("attention", "labels"),
    ("attention", "attention_random"),
    ("logits_attention", "logits"),
    ("logits_attention", "logits_attention_random"),
)


def compare(seeds: Sequence[int], bench: Bench, say: Callable[[str], None] = print) -> dict[str, Any]:
    """Train and measure every arm.

    Returns:
        Per arm and metric the mean, the seeds' means and a 95 % interval over pictures and seeds; paired differences of
        the arms in `COMPARED`; the teacher's values, and what attention that is spread evenly would score.
    """
    teacher = bench.train_teacher()
    targets = bench.targets(teacher)
    teacher_signals = run_split(teacher, bench.inputs(teacher))
    arms: dict[str, list[dict[str, NDArray[np.float64]]]] = {name: [] for name in ("finetune", *ARMS)}
    own: list[Signal] = []
    for seed in seeds:
        start = bench.finetune(seed)
        trained: dict[str, Callable[[], CVLM]] = {"finetune": lambda start=start: start}  # type: ignore[misc]
        trained |= {arm: partial(bench.distill, arm, start, targets, seed) for arm in ARMS}
        for arm, train in trained.items():
            model = train()
            own = run_split(model, bench.inputs(model))
            arms[arm].append(measure(own, teacher_signals, bench.test))
            means = ", ".join(f"{name} {arms[arm][-1][name].mean():.3f}" for name in METRICS)
            say(f"seed {seed}, {arm}: {means}")
    tables = {arm: {name: np.stack([row[name] for row in rows]) for name in METRICS} for arm, rows in arms.items()}
    clusters = bench.test.image_of
    comparisons = {}
    for first, second in COMPARED:
        differences = {name: paired_difference(tables[first][name], tables[second][name], clusters) for name in METRICS}
        line = verdict(differences["accuracy"], (first, second), "accuracy")
        comparisons[f"{first}_vs_{second}"] = {
            **{name: difference.as_json() for name, difference in differences.items()},
            "verdict": line,
        }
        say(line)
    reference = measure_teacher(teacher_signals, own, bench.test)
    return {
        "n": len(bench.test),
        "seeds": list(seeds),
        **reference,
        "arms": {arm: {name: arm_summary(table[name], clusters) for name in METRICS} for arm, table in tables.items()},
        "comparisons": comparisons,
    }


def main() -> None:
    """Measure, print, and write the result."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.alignment", description=__doc__)
    parser.add_argument("--out", type=Path, default=Path("benchmarks/results/alignment/easy_vqa.json"))
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--weight", type=float, default=1.0, help="of the cross-attention term")
    parser.add_argument("--labelled", type=float, default=0.04, help="share of the labels that students see")
    parser.add_argument("--train", type=int, default=10_000, help="training pairs")
    parser.add_argument("--test", type=int, default=2_000, help="held-out pairs")
    parser.add_argument("--epochs", type=float, default=1.0, help="factor on the length of every phase")
    arguments = parser.parse_args()
    begun, start = environment("cpu"), time.perf_counter()
    data = load_data(EasyVqaData(kind="easy_vqa"), "vqa")
    with tempfile.TemporaryDirectory() as scratch:
        save_text_encoder(Path(scratch) / "text", data.train.texts)
        bench = Bench(
            train=data.train.limit(arguments.train),
            test=data.test.limit(arguments.test),
            store=Path(scratch) / "features",
            text=Path(scratch) / "text",
            weight=arguments.weight,
            labelled=arguments.labelled,
            epochs=arguments.epochs,
        )
        measured = compare(arguments.seeds, bench, say=partial(print, flush=True))
    settings = {name: getattr(arguments, name) for name in ("weight", "labelled", "train", "test", "epochs")}
    text = {"kind": "RoBERTa, trained along", "tokenizer": "byte-level", "vocabulary": VOCABULARY, **TEXT}
    result = {
        "work": "students of another tokenizer, patch grid and head count, with true and random maps",
        "data": "easy-VQA; the first pairs of the official splits",
        "settings": {**settings, "teacher": TEACHER, "student": {**STUDENT, "text": text}},
        **measured,
        "seconds": round(time.perf_counter() - start),
        "environment": begun,
    }
    write_result(result, arguments.out)
    print(f"written to {arguments.out}")


if __name__ == "__main__":
    main()
