import json
import os

import pytest

from cvlm.cost.ledger import Ledger
from cvlm.cost.phase import PhaseCost
from cvlm.cost.references import Reference
from cvlm.errors import CvlmError

PHASE_KEYS = {
    "flops",
    "seconds",
    "device_seconds",
    "energy_joules",
    "energy_source",
    "peak_memory_bytes",
    "samples",
}
BASELINE_KEYS = {
    "name",
    "kind",
    "device_hours",
    "flops",
    "ratio_flops",
    "ratio_device_hours",
    "source",
    "assumptions",
}
REFERENCE = Reference(
    name="R", device="A100", spec="A100-SXM", device_hours=(1.0, 3.0), how="quoted", source="s", assumptions="a."
)


def _cost(flops=1000, seconds=36.0, memory=5):
    return PhaseCost(
        flops=flops,
        seconds=seconds,
        device_seconds=2 * seconds,
        energy_joules=7200.0,
        energy_source="estimated",
        peak_memory_bytes=memory,
        samples=10,
        device="NVIDIA A100-SXM4-80GB",
    )


def _read(path):
    return json.loads(path.read_text())


def test_file_has_exactly_the_documented_keys(tmp_path):
    path = tmp_path / "run" / "cost.json"
    Ledger(path).add("finetune", "seed0", _cost())
    content = _read(path)
    assert set(content) == {"phases", "total", "baselines", "machine"}
    assert set(content["phases"]) == {"finetune"}
    assert set(content["phases"]["finetune"]) == PHASE_KEYS | {"jobs"}
    assert set(content["phases"]["finetune"]["jobs"]["seed0"]) == PHASE_KEYS | {"device"}
    assert set(content["total"]) == PHASE_KEYS
    assert content["baselines"]
    assert all(set(row) == BASELINE_KEYS for row in content["baselines"])
    assert {row["kind"] for row in content["baselines"]} == {"published"}
    assert set(content["machine"]) == {"cpu", "cores", "gpus", "torch"}


def test_jobs_sum_to_phases_and_phases_to_the_total(tmp_path):
    path = tmp_path / "cost.json"
    ledger = Ledger(path)
    ledger.add("finetune", "seed0", _cost(flops=1, memory=5))
    ledger.add("finetune", "seed1", _cost(flops=20, memory=9))
    ledger.add("distill", "seed0", _cost(flops=300, memory=7))
    content = _read(path)
    assert content["phases"]["finetune"]["flops"] == 21
    assert content["phases"]["finetune"]["peak_memory_bytes"] == 9
    assert content["total"]["flops"] == 321
    assert content["total"]["seconds"] == 108.0
    assert content["total"]["peak_memory_bytes"] == 9


def test_booking_a_job_again_replaces_it(tmp_path):
    path = tmp_path / "cost.json"
    Ledger(path).add("finetune", "seed0", _cost(flops=40))
    resumed = Ledger(path)
    assert resumed.get("finetune", "seed0") == _cost(flops=40)
    resumed.add("finetune", "seed0", _cost(flops=100))
    assert _read(path)["total"]["flops"] == 100
    assert resumed.get("finetune", "seed1") is None


def test_two_ledgers_of_one_file_do_not_lose_each_others_jobs(tmp_path):
    first, second = Ledger(tmp_path / "cost.json"), Ledger(tmp_path / "cost.json")
    first.add("teacher", "all", _cost())
    second.add("finetune", "seed0", _cost())
    assert set(_read(tmp_path / "cost.json")["phases"]) == {"teacher", "finetune"}


def test_a_crash_before_the_replacement_leaves_the_old_file(tmp_path, monkeypatch):
    path = tmp_path / "cost.json"
    ledger = Ledger(path)
    ledger.add("finetune", "seed0", _cost())
    before = path.read_bytes()

    def crash(source, target):
        assert json.loads(source.read_text())  # the draft is complete when it replaces the file
        raise OSError("killed here")

    monkeypatch.setattr(os, "replace", crash)
    with pytest.raises(OSError, match="killed here"):
        ledger.add("finetune", "seed1", _cost())
    assert path.read_bytes() == before
    assert list(tmp_path.iterdir()) == [path]


def test_a_measured_baseline_has_ratios_and_survives_reopening(tmp_path):
    path = tmp_path / "cost.json"
    ledger = Ledger(path, [REFERENCE])
    ledger.add_baseline("full training", _cost(flops=4000, seconds=360.0), source="runs/full", assumptions="same data")
    Ledger(path, [REFERENCE]).add("finetune", "seed0", _cost(flops=1000, seconds=36.0))
    measured, published = _read(path)["baselines"]
    assert set(measured) == BASELINE_KEYS | {"cost"}
    assert measured["kind"] == "measured"
    assert measured["device_hours"] == pytest.approx(0.2)
    assert measured["ratio_flops"] == 0.25
    assert measured["ratio_device_hours"] == pytest.approx(0.1)
    assert published["name"] == "R"
    assert Ledger(path).total().flops == 1000


@pytest.mark.parametrize("text", ["{", "[]", "{}", '{"phases": {"a": {}}, "baselines": []}'])
def test_another_file_is_refused_not_overwritten(tmp_path, text):
    path = tmp_path / "cost.json"
    path.write_text(text)
    with pytest.raises(CvlmError, match="is not a cost ledger"):
        Ledger(path)
    assert path.read_text() == text


def test_empty_names_are_refused(tmp_path):
    with pytest.raises(ValueError, match="must not be empty"):
        Ledger(tmp_path / "cost.json").add("finetune", "", _cost())
