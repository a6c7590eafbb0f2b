import pytest

from cvlm.cost.phase import PhaseCost, merge_ranks
from cvlm.errors import CvlmError

ONE = PhaseCost(
    flops=100,
    seconds=2.0,
    device_seconds=2.0,
    energy_joules=50.0,
    energy_source="measured",
    peak_memory_bytes=7,
    samples=3,
    device="A",
)
TWO = PhaseCost(
    flops=10,
    seconds=5.0,
    device_seconds=10.0,
    energy_joules=4.0,
    energy_source="estimated",
    peak_memory_bytes=6,
    samples=1,
    device="B",
)


def test_sum_adds_all_but_memory():
    total = ONE + TWO
    assert total == PhaseCost(
        flops=110,
        seconds=7.0,
        device_seconds=12.0,
        energy_joules=54.0,
        energy_source="estimated",
        peak_memory_bytes=7,
        samples=4,
        device="A + B",
    )


def test_energy_is_measured_only_if_all_of_it_is():
    assert (ONE + ONE).energy_source == "measured"
    assert (TWO + ONE).energy_source == "estimated"


def test_unknown_energy_of_a_part_makes_the_sum_unknown():
    unknown = PhaseCost(energy_joules=None)
    assert (ONE + unknown).energy_joules is None
    assert (unknown + ONE).energy_joules is None


def test_same_device_is_named_once():
    assert (ONE + TWO + ONE).device == "A + B"


def test_ranks_that_ran_together_share_wall_time():
    merged = merge_ranks([ONE, TWO])
    assert merged.seconds == 5.0
    assert merged.device_seconds == 12.0
    assert merged.flops == 110


def test_json_round_trip():
    assert PhaseCost.from_json(ONE.to_json()) == ONE


def test_record_with_other_keys_is_refused():
    record = ONE.to_json()
    del record["flops"]
    with pytest.raises(CvlmError, match=r"unknown or missing keys: flop, flops\."):
        PhaseCost.from_json({**record, "flop": 1})


def test_record_with_another_energy_source_is_refused():
    with pytest.raises(CvlmError, match="'guessed' is neither"):
        PhaseCost.from_json({**ONE.to_json(), "energy_source": "guessed"})
