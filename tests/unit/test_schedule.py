"""Weights over time: closed forms, and what is refused."""

import math

import pytest

from distill import DistillError, build_objective
from distill.schedule import WeightSchedule, parse_weight, weight_at


@pytest.mark.parametrize(
    ("weight", "expected"),
    [
        (0.3, {0.0: 0.3, 0.5: 0.3, 1.0: 0.3}),
        ({"schedule": "constant", "from": 2}, {0.0: 2, 0.99: 2, 1.0: 2}),
        ({"schedule": "linear", "from": 0, "to": 2}, {0.0: 0, 0.25: 0.5, 0.5: 1, 1.0: 2}),
        ({"schedule": "linear", "from": 3, "to": 1, "at": 0.5}, {0.0: 3, 0.25: 2, 0.5: 1, 0.9: 1}),
        ({"schedule": "cosine", "from": 0, "to": 2}, {0.0: 0, 1 / 3: 0.5, 0.5: 1, 2 / 3: 1.5, 1.0: 2}),
        ({"schedule": "cosine", "from": 1, "to": 0, "at": 0.4}, {0.2: 0.5, 0.4: 0, 0.8: 0}),
        ({"schedule": "switch", "from": 0, "to": 0.5, "at": 0.7}, {0.0: 0, 0.6999: 0, 0.7: 0.5, 1.0: 0.5}),
        ({"schedule": "switch", "from": 1, "to": 0, "at": 0}, {0.0: 0, 0.5: 0}),
    ],
)
def test_values(weight, expected):
    parsed = parse_weight(weight)
    for progress, value in expected.items():
        assert weight_at(parsed, progress) == pytest.approx(value, abs=1e-12)


def test_a_cosine_begins_and_ends_flat():
    schedule = WeightSchedule(schedule="cosine", start=0.0, end=1.0)
    step = 1e-4
    assert schedule(step) < 1e-6
    assert 1 - schedule(1 - step) < 1e-6
    assert schedule(0.5 + step) - schedule(0.5) == pytest.approx(math.pi / 2 * step, rel=1e-3)


@pytest.mark.parametrize(
    ("weight", "reason"),
    [
        (-1, "weight is -1, it must be finite and not negative"),
        (math.nan, "weight is nan"),
        ("much", "weight is much"),
        (True, "weight is True"),
        ({"schedule": "step", "from": 0, "to": 1}, "schedule is 'step'; use one of constant, linear"),
        ({"from": 0, "to": 1}, "lacks schedule"),
        ({"schedule": "linear", "from": 0}, "lacks to"),
        ({"schedule": "switch", "from": 0, "to": 1}, "lacks at"),
        ({"schedule": "linear", "from": 0, "to": 1, "until": 1}, "no key 'until'"),
        ({"schedule": "linear", "from": 0, "to": math.inf}, "'to' is inf"),
        ({"schedule": "linear", "from": -1, "to": 1}, "'from' is -1"),
        ({"schedule": "switch", "from": 0, "to": 1, "at": 1.2}, "'at' is 1.2; it must be a share"),
        ({"schedule": "constant", "from": 0, "to": 1}, "constant one cannot go from 0 to 1"),
    ],
)
def test_wrong_weights_are_refused_by_value(weight, reason):
    with pytest.raises(DistillError, match=reason):
        build_objective("labels", weight=weight)


def test_an_objective_keeps_its_schedule():
    built = build_objective("entropy", weight={"schedule": "switch", "from": 0, "to": 0.5, "at": 0.7})
    assert built.weight == WeightSchedule(schedule="switch", start=0, end=0.5, at=0.7)
    assert build_objective("entropy", weight=built.weight).weight is built.weight
