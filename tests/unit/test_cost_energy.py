import ctypes

import pytest

from cvlm.cost.devices import CPU_UTILISATION, CPU_WATTS, DEVICES, find_device
from cvlm.cost.energy import NvmlCounter, RaplCounter, assumed_watts, open_cpu_counter


class FakeNvml:
    """The four entry points that are used, over boards given as uuid -> millijoules."""

    def __init__(self, boards, code=0):
        self.boards = boards
        self.code = code
        self.order = list(boards)

    def nvmlInit_v2(self):  # noqa: N802
        return 0

    def nvmlDeviceGetHandleByUUID(self, uuid, handle):  # noqa: N802
        if uuid.decode() not in self.boards:
            return 6
        handle._obj.value = 1 + self.order.index(uuid.decode())
        return 0

    def nvmlDeviceGetTotalEnergyConsumption(self, handle, millijoules):  # noqa: N802
        assert isinstance(handle, ctypes.c_void_p)
        assert isinstance(millijoules._obj, ctypes.c_ulonglong)
        millijoules._obj.value = self.boards[self.order[handle.value - 1]]
        return self.code


def test_nvml_sums_the_boards_in_joules():
    library = FakeNvml({"GPU-a": 1500, "GPU-b": 2500, "GPU-c": 9000})
    counter = NvmlCounter(["GPU-a", "GPU-b"], library)
    assert counter.read() == 4.0
    library.boards["GPU-b"] = 12500
    assert counter.read() == 14.0


def test_nvml_errors_are_errors():
    with pytest.raises(OSError, match="nvmlDeviceGetHandleByUUID returned error 6"):
        NvmlCounter(["GPU-z"], FakeNvml({"GPU-a": 1}))
    with pytest.raises(OSError, match="TotalEnergyConsumption returned error 3"):
        NvmlCounter(["GPU-a"], FakeNvml({"GPU-a": 1}, code=3))


def _zone(root, name, label, energy, size=1_000_000):
    zone = root / name
    zone.mkdir()
    (zone / "name").write_text(label + "\n")
    (zone / "energy_uj").write_text(f"{energy}\n")
    (zone / "max_energy_range_uj").write_text(f"{size}\n")
    return zone


def test_rapl_sums_packages_only_and_follows_a_wrap(tmp_path):
    first = _zone(tmp_path, "intel-rapl:0", "package-0", 100)
    second = _zone(tmp_path, "intel-rapl:1", "package-1", 999_000)
    core = _zone(tmp_path, "intel-rapl:0:0", "core", 5)
    platform = _zone(tmp_path, "intel-rapl:2", "psys", 5)
    counter = RaplCounter(tmp_path)
    (first / "energy_uj").write_text("400100")
    (second / "energy_uj").write_text("1000")  # 1,000 to the end of its range and 1,000 after it
    for zone in (core, platform):
        (zone / "energy_uj").write_text("900000")
    assert counter.read() == pytest.approx(0.402)
    assert counter.read() == pytest.approx(0.402)


def test_no_rapl_is_no_counter(tmp_path):
    assert open_cpu_counter(tmp_path / "absent") is None
    _zone(tmp_path, "intel-rapl:0", "psys", 5)
    assert open_cpu_counter(tmp_path) is None


def test_assumed_power():
    assert assumed_watts("any", 4, is_cpu=True) == CPU_WATTS * CPU_UTILISATION == 42.5
    assert assumed_watts("NVIDIA A100-SXM4-80GB", 4, is_cpu=False) == 1600.0
    assert assumed_watts("NVIDIA H100 PCIe", 1, is_cpu=False) is None
    assert assumed_watts("Some Card", 1, is_cpu=False) is None


@pytest.mark.parametrize(
    ("torch_name", "name"),
    [
        ("NVIDIA A100-SXM4-80GB", "A100-SXM"),
        ("NVIDIA A100-PCIE-40GB", "A100-PCIe"),
        ("NVIDIA A100 80GB PCIe", "A100-PCIe"),
        ("NVIDIA H100 80GB HBM3", "H100-SXM"),
        ("NVIDIA H100 PCIe", "H100-PCIe"),
        ("NVIDIA H100 NVL", "H100-NVL"),
        ("NVIDIA H200", "H200-SXM"),
        ("NVIDIA H200 NVL", "H200-NVL"),
        ("Tesla V100-SXM2-16GB", "V100-SXM"),
        ("Tesla V100-PCIE-32GB", "V100-PCIe"),
        ("NVIDIA L4", "L4"),
        ("NVIDIA L40S", "L40S"),
        ("Tesla T4", "T4"),
        ("NVIDIA GeForce RTX 4090", "RTX4090"),
    ],
)
def test_devices_are_found_by_the_names_torch_gives(torch_name, name):
    spec = find_device(torch_name)
    assert spec is not None
    assert spec.name == name


@pytest.mark.parametrize(
    "torch_name", ["NVIDIA L40", "NVIDIA GH200 480GB", "NVIDIA H100 80GB HBM3 MIG 1g.10gb", "RTX 3090 Ti", "Radeon", ""]
)
def test_other_devices_are_unknown(torch_name):
    assert find_device(torch_name) is None


def test_every_device_states_its_source():
    assert all(spec.source for spec in DEVICES.values())
    assert DEVICES["A100-SXM"].peak_flops("tf32") == 156e12
    assert DEVICES["T4"].peak_flops("tf32") is None
    assert DEVICES["A100-SXM"].family == DEVICES["A100-PCIe"].family == "A100"


def test_gpus_are_opened_by_uuid_and_only_if_all_are_visible(monkeypatch):
    from types import SimpleNamespace

    import torch

    from cvlm.cost import energy

    opened = []
    monkeypatch.setattr(energy, "NvmlCounter", lambda uuids: opened.append(uuids) or "counter")
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setattr(
        torch.cuda, "get_device_properties", lambda index: SimpleNamespace(uuid=["GPU-aa", "bb"][index])
    )
    assert energy.open_gpu_counter([0, 1]) == "counter"
    assert opened == [["GPU-aa", "GPU-bb"]]
    assert energy.open_gpu_counter([0, 1, 2]) is None


def test_a_board_without_counter_falls_back_to_the_estimate(monkeypatch):
    from types import SimpleNamespace

    import torch

    from cvlm.cost import energy

    monkeypatch.setattr(energy.ctypes, "CDLL", lambda name: FakeNvml({"GPU-a": 1}, code=3))
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda index: SimpleNamespace(uuid="a"))
    assert energy.open_gpu_counter([0]) is None
