"""metrics.json: every arm with intervals, the differences between arms, and what they show."""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from benchmarks.statistics import arm_summary, paired_difference, verdict
from benchmarks.tasks import PRIMARY, Scores

BASELINE_ARM = "finetune"
ONE_SEED = "; one seed each, so the interval leaves out how much training varies"


def metrics_json(task: str, split: str, arms: Mapping[str, Sequence[Scores]], pairs: Sequence[tuple[str, str]]) -> Any:
    """Summarise a run.

    Args:
        task: names the primary metric.
        split: what was scored, such as `test`.
        arms: arm -> scores, one per seed (one alone for arms without seeds).
        pairs: which arms to compare: (arm, reference).
    """
    primary = PRIMARY[task]
    first = next(iter(arms.values()))[0]
    comparisons, verdicts = {}, []
    for arm, reference in pairs:
        ours, theirs = _stack(arms[arm], primary), _stack(arms[reference], primary)
        difference = paired_difference(ours, theirs, first.clusters[primary])
        comparisons[f"{arm}_vs_{reference}"] = {"metric": primary, **difference.as_json()}
        one_seed = "" if max(len(arms[arm]), len(arms[reference])) > 1 else ONE_SEED
        verdicts.append(verdict(difference, (arm, reference), primary) + one_seed)
    return {
        "task": task,
        "split": split,
        "n": len(first.values[primary]),
        "metric": primary,
        "arms": {name: _summaries(scores) for name, scores in arms.items()},
        "comparisons": comparisons,
        "verdict": verdicts[0] if verdicts else "nothing was compared",
        "verdicts": verdicts,
    }


def compared_arms(arms: Sequence[str]) -> list[tuple[str, str]]:
    """Choose the pairs that a report compares: phase 2 with phase 1, with its own ablations, and with the teacher.

    The last student arm is the main one and comes first.
    """
    students = [arm for arm in arms if arm not in ("majority", "teacher", BASELINE_ARM)]
    pairs = [(arm, BASELINE_ARM) for arm in reversed(students) if BASELINE_ARM in arms]
    pairs += [(students[-1], arm) for arm in students[:-1]]
    if "teacher" in arms and students:
        pairs.append((students[-1], "teacher"))
    return pairs


def _stack(scores: Sequence[Scores], metric: str) -> Any:
    return np.stack([one.values[metric] for one in scores])


def _summaries(scores: Sequence[Scores]) -> dict[str, Any]:
    return {name: arm_summary(_stack(scores, name), scores[0].clusters[name]) for name in scores[0].values}
