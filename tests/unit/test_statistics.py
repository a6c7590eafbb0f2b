"""Intervals and paired differences: coverage by simulation, closed forms, and the effect of each pairing."""

import json
import math
import time

import numpy as np
import pytest
import torch

from benchmarks.statistics import Difference, arm_summary, bootstrap_interval, paired_difference, verdict


def width(interval):
    return interval[1] - interval[0]


def simulate(rng, *, seeds, n_cluster, per_cluster, seed_sd, cluster_sd, noise_sd):
    """Draw scores ``[seeds, n]`` with mean zero from the crossed model of benchmarks.statistics."""
    n = n_cluster * per_cluster
    clusters = np.repeat(np.arange(n_cluster), per_cluster)
    values = seed_sd * rng.standard_normal((seeds, 1)) + cluster_sd * rng.standard_normal(n_cluster)[clusters]
    return values + noise_sd * rng.standard_normal((seeds, n)), clusters


# 400 runs of a true 95% interval stay within 0.95 +- 0.036 (3.3 standard errors). The lower bound is that, less one
# point for a percentile of 400 draws; the upper one allows for the method, which is wide where three seeds leave open
# whether they differ at all (`noise`).
@pytest.mark.parametrize(
    "model",
    [
        pytest.param({"seeds": 1, "seed_sd": 0.0, "cluster_sd": 1.0, "noise_sd": 0.0}, id="one seed"),
        pytest.param({"seeds": 3, "seed_sd": 0.0, "cluster_sd": 0.0, "noise_sd": 1.0}, id="noise"),
        pytest.param({"seeds": 3, "seed_sd": 0.0, "cluster_sd": 1.0, "noise_sd": 0.3}, id="examples"),
        pytest.param({"seeds": 3, "seed_sd": 0.07, "cluster_sd": 0.5, "noise_sd": 1.0}, id="mixed"),
        pytest.param({"seeds": 3, "seed_sd": 1.0, "cluster_sd": 0.5, "noise_sd": 0.5}, id="seeds"),
        pytest.param({"seeds": 2, "seed_sd": 0.03, "cluster_sd": 0.3, "noise_sd": 0.4}, id="two seeds"),
    ],
)
def test_coverage_when_there_is_no_difference(model):
    rng = np.random.default_rng(0)
    covered = 0
    for run in range(400):
        values, clusters = simulate(rng, n_cluster=100, per_cluster=2, **model)
        low, high = paired_difference(values, np.zeros_like(values), clusters, resamples=400, seed=run).ci95
        covered += low <= 0 <= high
    assert 0.905 <= covered / 400 <= 0.995


def test_coverage_with_unequal_seeds_and_binary_scores():
    rng = np.random.default_rng(1)
    covered = 0
    for run in range(300):
        difficulty = rng.random(300)
        a, b = (rng.random((seeds, 300)) < difficulty for seeds in (3, 2))
        low, high = paired_difference(a, b, resamples=400, seed=run).ci95
        covered += low <= 0 <= high
    assert 0.90 <= covered / 300 <= 0.995


def test_one_seed_equals_the_normal_interval():
    values = np.random.default_rng(2).standard_normal(2000) + 0.03
    result = paired_difference(values, np.zeros(2000), resamples=20000)
    error = values.std(ddof=1) / math.sqrt(2000)
    assert result.difference == pytest.approx(values.mean())
    assert result.ci95 == pytest.approx((values.mean() - 1.96 * error, values.mean() + 1.96 * error), abs=0.05 * error)
    assert result.p_value == pytest.approx(math.erfc(abs(values.mean()) / error / math.sqrt(2)), abs=0.02)


def test_seeds_alone_give_students_interval():
    # Examples that all agree leave only the seeds: mean +- t(0.975, 2 degrees) s / sqrt(3), with t = 4.303. The draws
    # of three seeds have few values, so the quantile is near t and not equal to it.
    per_seed = np.array([0.50, 0.52, 0.57])
    low, high = paired_difference(np.repeat(per_seed[:, None], 50, axis=1), np.zeros((1, 50)), resamples=20000).ci95
    half = 4.303 * per_seed.std(ddof=1) / math.sqrt(3)
    assert (high - low) / 2 == pytest.approx(half, rel=0.15)


def test_finds_a_known_difference():
    rng = np.random.default_rng(3)
    difficulty = rng.random(2000)
    a, b = (rng.random((3, 2000)) < difficulty * share for share in (1.0, 0.9))
    result = paired_difference(a, b)
    assert result.difference == pytest.approx(a.mean() - b.mean())
    assert result.difference == pytest.approx(0.05, abs=0.03)
    assert 0 < result.ci95[0] < result.difference < result.ci95[1]
    assert result.p_value < 0.01


def test_swapping_the_arms_turns_the_sign():
    rng = np.random.default_rng(4)
    a, b = rng.random((3, 400)) + 0.02, rng.random((3, 400))
    forth, back = paired_difference(a, b, resamples=20000), paired_difference(b, a, resamples=20000)
    assert back.difference == -forth.difference
    assert back.ci95 == pytest.approx((-forth.ci95[1], -forth.ci95[0]), abs=0.002)
    assert back.p_value == pytest.approx(forth.p_value, abs=0.02)


def test_clusters_widen_the_interval_of_correlated_examples():
    # Five copies of each question say no more than one: the honest interval is that of the 200 originals.
    originals = np.random.default_rng(5).standard_normal((3, 200))
    copies, clusters = np.repeat(originals, 5, axis=1), np.repeat(np.arange(200), 5)
    honest = width(bootstrap_interval(originals, resamples=20000))
    assert width(bootstrap_interval(copies, clusters, resamples=20000)) == pytest.approx(honest, rel=0.05)
    single = originals[:1]
    naive = width(bootstrap_interval(np.repeat(single, 5, axis=1), resamples=20000))
    honest = width(bootstrap_interval(np.repeat(single, 5, axis=1), clusters, resamples=20000))
    assert honest / naive == pytest.approx(math.sqrt(5), rel=0.05)


def test_cluster_labels_may_be_names_in_any_order():
    rng = np.random.default_rng(6)
    values, numbers = rng.random((2, 60)), rng.integers(0, 20, 60)
    names = np.array([f"picture {number:02d}.jpg" for number in numbers])
    assert bootstrap_interval(values, names) == bootstrap_interval(values, numbers)


def test_unequal_clusters_weigh_by_their_questions():
    values, clusters = np.array([[1.0] * 9 + [0.0]]), [0] * 9 + [1]
    assert paired_difference(values, np.zeros((1, 10)), clusters).difference == 0.9


def test_pairing_examples_narrows_the_interval():
    rng = np.random.default_rng(7)
    difficulty = 3 * rng.standard_normal(500)
    a, b = (difficulty + rng.standard_normal((3, 500)) for _ in range(2))
    unpaired = paired_difference(a, b[:, rng.permutation(500)])
    assert width(paired_difference(a, b).ci95) < 0.5 * width(unpaired.ci95)


def test_pairing_seeds_narrows_the_interval():
    rng = np.random.default_rng(8)
    luck = np.array([[0.0], [0.4], [1.0]])
    a, b = (luck + 0.1 * rng.standard_normal((3, 500)) for _ in range(2))
    assert width(paired_difference(a, b).ci95) < 0.2 * width(paired_difference(a, b[[2, 0, 1]]).ci95)


def test_one_row_meets_every_row_of_the_other_arm():
    rng = np.random.default_rng(9)
    a, teacher = rng.random((3, 200)), rng.random(200)
    once, repeated = paired_difference(a, teacher), paired_difference(a, np.tile(teacher, (3, 1)))
    assert once.difference == pytest.approx(repeated.difference)
    assert once.ci95 == pytest.approx(repeated.ci95)
    assert paired_difference(teacher, a).difference == pytest.approx(-once.difference)


def test_equal_arms():
    values = np.random.default_rng(10).random((3, 100))
    assert paired_difference(values, values) == Difference(difference=0.0, ci95=(0.0, 0.0), p_value=1.0)


def test_the_seed_decides_the_draws():
    a, b = np.random.default_rng(11).random((2, 3, 100))
    assert paired_difference(a, b, seed=1) == paired_difference(a, b, seed=1)
    assert paired_difference(a, b, seed=1) != paired_difference(a, b, seed=2)


def test_p_value_is_never_zero():
    result = paired_difference(np.ones((3, 50)), np.zeros((3, 50)), resamples=999)
    assert result.p_value == pytest.approx(2 / 1000)


def test_arm_summary_is_what_metrics_json_holds():
    values = torch.tensor([[1.0, 1.0, 1.0, 0.0], [1.0, 1.0, 0.0, 0.0]])
    summary = arm_summary(values)
    assert json.loads(json.dumps(summary)) == summary
    assert (summary["mean"], summary["per_seed"]) == (0.625, [0.75, 0.5])
    low, high = summary["ci95"]
    assert 0 <= low <= 0.625 <= high <= 1


def test_difference_goes_into_json():
    result = paired_difference(np.eye(4), np.zeros((4, 4))).as_json()
    assert set(json.loads(json.dumps(result))) == {"difference", "ci95", "p_value"}


@pytest.mark.parametrize(
    ("interval", "p_value", "line"),
    [
        (
            (-0.01, 0.05),
            0.21,
            "no difference shown between distill and finetune in vqa_accuracy: "
            "+2.00 points (95% interval -1.00 to +5.00, p = 0.21)",
        ),
        (
            (0.0, 0.05),
            0.05,
            "no difference shown between distill and finetune in vqa_accuracy: "
            "+2.00 points (95% interval +0.00 to +5.00, p = 0.05)",
        ),
        (
            (0.01, 0.03),
            0.0004,
            "distill is higher than finetune in vqa_accuracy: +2.00 points (95% interval +1.00 to +3.00, p < 0.001)",
        ),
    ],
)
def test_verdict(interval, p_value, line):
    difference = Difference(difference=0.02, ci95=interval, p_value=p_value)
    assert verdict(difference, ("distill", "finetune"), "vqa_accuracy") == line


def test_verdict_of_a_loss():
    difference = Difference(difference=-0.02, ci95=(-0.03, -0.01), p_value=0.002)
    assert verdict(difference, ("distill", "teacher"), "accuracy").startswith(
        "distill is lower than teacher in accuracy"
    )


@pytest.mark.parametrize(
    ("a", "b", "clusters", "message"),
    [
        (np.zeros((3, 4)), np.zeros((3, 5)), None, "answered 4 and 5 examples"),
        (np.zeros((3, 4)), np.zeros((3, 4)), [0, 1, 2], "one label for each of the 4 examples"),
        (np.zeros((3, 4)), np.zeros((3, 4)), [7, 7, 7, 7], "at least two independent examples"),
        (np.full((3, 4), np.nan), np.zeros((3, 4)), None, "12 of 12 scores are not finite"),
        (np.zeros((2, 3, 4)), np.zeros((3, 4)), None, r"scores must be \[seeds, n\]"),
        (np.zeros((3, 0)), np.zeros((3, 0)), None, r"scores must be \[seeds, n\]"),
    ],
)
def test_refuses(a, b, clusters, message):
    with pytest.raises(ValueError, match=message):
        paired_difference(a, b, clusters)


def test_speed_at_the_size_of_a_real_validation_set():
    rng = np.random.default_rng(12)
    a, b = rng.random((2, 3, 9673))
    start = time.process_time()
    paired_difference(a, b, resamples=5000)
    assert time.process_time() - start < 3
