import time

import pytest

import cvlm.cost.meter as meter_module
from cvlm.cost.devices import CPU_UTILISATION, CPU_WATTS
from cvlm.cost.meter import PhaseMeter
from cvlm.cost.phase import PhaseCost, merge_ranks

MIB = 2**20


class FakeCounter:
    """Rises by 10 J at each reading."""

    def __init__(self, fail_after=None):
        self.joules = 100.0
        self.fail_after = fail_after

    def read(self):
        self.joules += 10.0
        if self.fail_after is not None and self.joules > self.fail_after:
            raise OSError("gone")
        return self.joules


@pytest.fixture(autouse=True)
def no_counter(monkeypatch):
    """The machine under test may have a counter; each test says what it has."""
    monkeypatch.setattr(meter_module, "open_cpu_counter", lambda: None)


def _samplers():
    import threading

    return [thread for thread in threading.enumerate() if thread.name == "cvlm-cost-sampler"]


def test_time_and_what_it_was_told():
    with PhaseMeter() as meter:
        meter.add(flops=100, samples=3)
        meter.add(flops=11)
        time.sleep(0.2)
    assert 0.2 <= meter.cost.seconds < 2.0
    assert meter.cost.device_seconds == meter.cost.seconds
    assert (meter.cost.flops, meter.cost.samples) == (111, 3)
    assert meter.cost.device


def test_cost_is_readable_inside_and_fixed_afterwards():
    with PhaseMeter() as meter:
        meter.add(samples=2)
        inside = meter.cost
        time.sleep(0.01)
    assert inside.samples == 2
    assert inside.seconds < meter.cost.seconds
    assert meter.cost is meter.cost


def test_peak_memory_sees_200_mb_that_are_gone_at_the_end():
    with PhaseMeter() as quiet:
        pass
    with PhaseMeter(interval=0.02) as meter:
        block = bytearray(200 * MIB)
        block[::4096] = b"x" * len(block[::4096])  # touch every page, so that it is resident
        time.sleep(0.2)
        del block
    assert meter.cost.peak_memory_bytes >= quiet.cost.peak_memory_bytes + 190 * MIB


def test_peak_memory_includes_children():
    import subprocess
    import sys

    code = f"import time; block = b'x' * {200 * MIB}; print('ready', flush=True); time.sleep(30)"
    with PhaseMeter() as quiet:
        pass
    with PhaseMeter(interval=0.02) as meter, subprocess.Popen([sys.executable, "-c", code], stdout=-1) as child:
        assert child.stdout is not None
        child.stdout.readline()
        time.sleep(0.2)
        child.kill()
    assert meter.cost.peak_memory_bytes >= quiet.cost.peak_memory_bytes + 190 * MIB


def test_energy_without_counter_is_estimated():
    with PhaseMeter() as meter:
        time.sleep(0.05)
    assert meter.cost.energy_source == "estimated"
    assert meter.cost.energy_joules == pytest.approx(CPU_WATTS * CPU_UTILISATION * meter.cost.seconds)


def test_energy_with_counter_is_measured(monkeypatch):
    counter = FakeCounter()
    monkeypatch.setattr(meter_module, "open_cpu_counter", lambda: counter)
    with PhaseMeter() as meter:
        pass
    assert meter.cost.energy_source == "measured"
    assert meter.cost.energy_joules == pytest.approx(counter.joules - 110.0, abs=10.0)
    assert meter.cost.energy_joules > 0


def test_counter_that_fails_half_way_makes_it_an_estimate(monkeypatch):
    monkeypatch.setattr(meter_module, "open_cpu_counter", lambda: FakeCounter(fail_after=130.0))
    with PhaseMeter(interval=0.01) as meter:
        time.sleep(0.1)
    assert meter.cost.energy_source == "estimated"
    assert meter.cost.energy_joules == pytest.approx(CPU_WATTS * CPU_UTILISATION * meter.cost.seconds)


def test_only_local_rank_0_of_a_node_samples():
    with PhaseMeter(local_rank=0, node_devices=2), PhaseMeter(local_rank=1, node_devices=2) as second:
        assert len(_samplers()) == 1
    assert not _samplers()
    assert second.cost.energy_joules == 0.0
    assert second.cost.device_seconds == 0.0  # the ranks share one CPU
    assert second.cost.seconds > 0


def test_resume_continues_the_earlier_record():
    with PhaseMeter() as first:
        first.add(flops=5, samples=1)
    with PhaseMeter(resume_from=first.cost) as second:
        second.add(flops=7, samples=2)
    assert (second.cost.flops, second.cost.samples) == (12, 3)
    assert second.cost.seconds > first.cost.seconds
    assert second.cost.device == first.cost.device


def test_resumed_estimate_stays_an_estimate(monkeypatch):
    monkeypatch.setattr(meter_module, "open_cpu_counter", lambda: FakeCounter())
    with PhaseMeter(resume_from=PhaseCost(energy_joules=1.0, energy_source="estimated")) as meter:
        pass
    assert meter.cost.energy_source == "estimated"


def test_cost_survives_an_exception():
    meter = PhaseMeter()

    def interrupted():
        with meter:
            meter.add(samples=4)
            raise KeyError("interrupted")

    with pytest.raises(KeyError, match="interrupted"):
        interrupted()
    assert meter.cost.samples == 4
    assert not _samplers()


def test_misuse_is_refused():
    with pytest.raises(ValueError, match="devices=0"):
        PhaseMeter(devices=0)
    meter = PhaseMeter()
    with pytest.raises(RuntimeError, match="not been entered"):
        _ = meter.cost
    with meter:
        pass
    with pytest.raises(RuntimeError, match="one block"):
        meter.__enter__()


@pytest.fixture
def two_gpus(monkeypatch):
    """A machine with two A100 as far as torch.cuda tells; returns the calls made."""
    import torch

    calls = []
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 0)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "NVIDIA A100-SXM4-80GB")
    monkeypatch.setattr(torch.cuda, "synchronize", lambda device: calls.append(("synchronize", device)))
    monkeypatch.setattr(torch.cuda, "reset_peak_memory_stats", lambda device: calls.append(("reset", device)))
    monkeypatch.setattr(torch.cuda, "max_memory_allocated", lambda device: 12345)
    return calls


def test_cuda_uses_torchs_peak_and_waits_for_the_device(two_gpus, monkeypatch):
    opened = []
    monkeypatch.setattr(meter_module, "open_gpu_counter", lambda indices: opened.append(indices) or FakeCounter())
    with PhaseMeter(device="cuda:1") as meter:
        pass
    assert meter.cost.peak_memory_bytes == 12345
    assert meter.cost.device == "NVIDIA A100-SXM4-80GB"
    assert meter.cost.energy_source == "measured"
    assert opened == [[1]]
    assert two_gpus == [("synchronize", "cuda:1"), ("reset", "cuda:1"), ("synchronize", "cuda:1")]


def test_cuda_node_is_metered_by_local_rank_0_only(two_gpus, monkeypatch):
    opened = []
    monkeypatch.setattr(meter_module, "open_gpu_counter", lambda indices: opened.append(indices))
    with (
        PhaseMeter(device="cuda:0", local_rank=0, node_devices=2) as first,
        PhaseMeter(device="cuda:1", local_rank=1, node_devices=2) as second,
    ):
        pass
    assert opened == [[0, 1]]
    assert first.cost.energy_joules == pytest.approx(2 * 400.0 * first.cost.seconds)
    assert second.cost.energy_joules == 0.0
    merged = merge_ranks([first.cost, second.cost])
    assert merged.device_seconds == pytest.approx(first.cost.seconds + second.cost.seconds)
    assert merged.energy_source == "estimated"
