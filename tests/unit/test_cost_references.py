import pytest

from cvlm.cost.devices import DEVICES
from cvlm.cost.phase import PhaseCost
from cvlm.cost.references import ENCODER_RUNS, PRETRAINING_RUNS, UTILISATION, Reference, compare

ALL = [*PRETRAINING_RUNS, *ENCODER_RUNS]
BY_HAND = Reference(
    name="R",
    device="A100",
    spec="A100-SXM",
    device_hours=(1.0, 2.0),
    how="derived",
    precision="half",
    source="s",
    assumptions="a.",
)


@pytest.mark.parametrize("reference", ALL, ids=lambda reference: reference.name)
def test_every_row_has_a_public_source_and_usable_figures(reference):
    assert reference.source.startswith("github.com/") or "arXiv:" in reference.source
    assert "/work" not in reference.source + reference.assumptions
    assert reference.assumptions
    low, high = reference.device_hours
    assert 0 < low <= high
    assert reference.spec is None or reference.spec in DEVICES


def test_names_are_unique():
    assert len({reference.name for reference in ALL}) == len(ALL)


def test_ratios_by_hand():
    ours = PhaseCost(flops=10**18, device_seconds=540.0, device="NVIDIA A100-SXM4-40GB")
    (row,) = compare(ours, [BY_HAND])
    low, high = 1 * 3600 * 312e12 * 0.2, 2 * 3600 * 312e12 * 0.5
    assert row["flops"] == pytest.approx((low + high) / 2)
    assert row["ratio_flops"] == pytest.approx(10**18 / ((low + high) / 2))
    assert row["device_hours"] == 1.5
    assert row["ratio_device_hours"] == pytest.approx(0.1)
    assert row["kind"] == "published"
    assert "2.2e+17 to 1.1e+18" in row["assumptions"]
    assert "assumes utilisation, 20% to 50%" in row["assumptions"]
    assert "middle of 1 to 2" in row["assumptions"]
    assert "Unlike devices" not in row["assumptions"]


@pytest.mark.parametrize(
    ("device", "words"),
    [
        ("AMD EPYC 7B13", "AMD EPYC 7B13 hours beside hours of A100"),
        ("NVIDIA H200", "H200 hours beside hours of A100"),
        ("NVIDIA A100-SXM4-40GB + Some CPU", "A100 + Some CPU hours beside hours of A100"),
    ],
)
def test_unlike_devices_are_flagged(device, words):
    (row,) = compare(PhaseCost(flops=1, device_seconds=1.0, device=device), [BY_HAND])
    assert words in row["assumptions"]


def test_nothing_counted_gives_no_ratio():
    (row,) = compare(PhaseCost(), [BY_HAND])
    assert row["ratio_flops"] is None
    assert row["ratio_device_hours"] is None


def test_unknown_cards_give_no_flops():
    (lxmert,) = [reference for reference in PRETRAINING_RUNS if reference.name == "LXMERT"]
    (row,) = compare(PhaseCost(flops=5, device_seconds=1.0), [lxmert])
    assert row["flops"] is None
    assert row["ratio_flops"] is None
    assert row["ratio_device_hours"] == pytest.approx(1 / 3600 / 816)


def test_the_one_run_derived_in_closed_form_supports_the_utilisation_range():
    """METER's FLOPs over its device-hours, as a share of the TF32 peak, lies inside the assumed range."""
    meter = PRETRAINING_RUNS[0]
    assert meter.derived_flops is not None
    peak = DEVICES["A100-SXM"].peak_flops("tf32")
    assert peak is not None
    share = meter.derived_flops / (meter.mid_device_hours * 3600 * peak)
    assert UTILISATION[0] < share < UTILISATION[1]


def test_meter_closed_form_equals_a_count_on_a_model_of_the_same_shape():
    import torch
    from torch import nn

    from cvlm.cost.flops import count_flops
    from cvlm.cost.references import meter_flops_per_sample

    width, hidden, text, image = 768, 3072, 50, 325
    with torch.device("meta"):
        patches = nn.Linear(3 * 16 * 16, width)
        block = nn.TransformerEncoderLayer(width, 12, hidden, batch_first=True)
        cross = nn.TransformerDecoderLayer(width, 12, hidden, batch_first=True)
        project = nn.Linear(width, width)
        head = nn.Sequential(nn.Linear(width, width), nn.Linear(width, 50265))

        def forward():
            words, picture = torch.empty(1, text, width), torch.empty(1, image, width)
            patches(torch.empty(1, image - 1, 3 * 16 * 16))
            for _ in range(11):
                block(picture)
            for _ in range(12):
                block(words)
            project(words), project(picture)
            for _ in range(6):
                cross(words, picture), cross(picture, words)

        counted = 3 * (2 * count_flops(forward) + count_flops(lambda: head(torch.empty(1, text, width))))
    assert counted == meter_flops_per_sample()
