"""Published pretraining runs, and the comparison of a run's cost with them.

Every row cites a public source. What could not be found publicly is absent or None; no figure is from memory.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

from cvlm.cost.devices import DEVICES, Precision, find_device
from cvlm.cost.flops import linear_flops, training_flops, transformer_layer_flops
from cvlm.cost.phase import PhaseCost

# No public record states how busy these runs kept their devices. The one whose FLOPs can be derived from its code,
# METER, lies inside this range (see the tests).
UTILISATION = (0.2, 0.5)


@dataclass(frozen=True, kw_only=True)
class Reference:
    """One published pretraining run.

    Attributes:
        name: Model, and which run of it.
        device: What it ran on.
        spec: Key of the device in `cvlm.cost.devices.DEVICES`, None if the device is not known exactly.
        device_hours: Lowest and highest reading of the device-hours.
        how: "quoted" if the source states device-hours, "derived" if they are devices times stated wall time.
        precision: Format of the matrix products, for the FLOP estimate; None makes none.
        derived_flops: FLOPs in closed form, where the source code fixes all that is needed; else None.
        params: Parameters of the model.
        samples: Samples seen in pretraining, repeats included.
        source: Public source.
        assumptions: What to know when reading a ratio.
    """

    name: str
    device: str
    spec: str | None
    device_hours: tuple[float, float]
    how: Literal["quoted", "derived"]
    precision: Precision | None = None
    derived_flops: int | None = None
    params: int | None = None
    samples: int | None = None
    source: str
    assumptions: str

    @property
    def mid_device_hours(self) -> float:
        """Middle of the device-hours."""
        return sum(self.device_hours) / 2

    @property
    def flops_range(self) -> tuple[float, float] | None:
        """Lowest and highest FLOPs, None where neither the code nor the device allows an estimate."""
        if self.derived_flops is not None:
            return (float(self.derived_flops), float(self.derived_flops))
        if self.spec is None or self.precision is None:
            return None
        peak = DEVICES[self.spec].peak_flops(self.precision)
        if peak is None:
            return None
        low, high = (hours * 3600 * peak * share for hours, share in zip(self.device_hours, UTILISATION, strict=True))
        return (low, high)


def meter_flops_per_sample() -> int:
    """FLOPs that METER's pretraining spends on one sample, from its code (zdou0830/METER).

    ``meter/config.py``: width 768, hidden 4 x 768, 6 fusion layers per stream, 50 text tokens; README example: ViT-B/16
    at 288 pixels, so 18 x 18 patches and one class token. ``meter/modules/clip_model.py`` keeps 11 of the 12 vision
    blocks. ``meter/modules/objectives.py`` runs the whole model twice per sample, once with masked text and once for
    image-text matching. All parts train. Text is taken as padded to its full length, which is an upper bound.
    """
    width, hidden, text, image = 768, 4 * 768, 50, 18 * 18 + 1
    vision = linear_flops(image - 1, 3 * 16 * 16, width) + 11 * transformer_layer_flops(image, width, hidden)
    language = 12 * transformer_layer_flops(text, width, hidden)
    fusion = linear_flops(text + image, width, width) + 6 * (
        transformer_layer_flops(text, width, hidden, context=image)
        + transformer_layer_flops(image, width, hidden, context=text)
    )
    masked_words = linear_flops(text, width, width) + linear_flops(text, width, 50265)
    return training_flops(2 * (vision + language + fusion) + masked_words)


_METER_SAMPLES = 100_000 * 4096
_STARTS = "Pretraining of the encoders it starts from is excluded."
_REGIONS = "Region features: the object detector's training and its run over all images are excluded."

PRETRAINING_RUNS: tuple[Reference, ...] = (
    Reference(
        name="METER (CLIP ViT-B/16 + RoBERTa-base, 4M images)",
        device="8 x A100",
        spec="A100-SXM",
        device_hours=(1536.0, 1536.0),
        how="derived",
        derived_flops=_METER_SAMPLES * meter_flops_per_sample(),
        params=345_000_000,
        samples=_METER_SAMPLES,
        source="github.com/zdou0830/METER (meter/config.py: 100k steps of 4,096; modules: see meter_flops_per_sample); "
        "8 A100 for 8 days as secondary notes quote Dou et al., arXiv:2111.02387",
        assumptions="FLOPs in closed form from the released code, text padded to 50 tokens. Form factor of the A100 is "
        f"not stated. {_STARTS}",
    ),
    Reference(
        name="ALBEF",
        device="8 x A100",
        spec="A100-SXM",
        device_hours=(576.0, 768.0),
        how="derived",
        precision="tf32",
        params=233_000_000,
        source="github.com/salesforce/ALBEF (README: 8 A100; configs/Pretrain.yaml: 30 epochs of batch 8 x 64); "
        "3 to 4 days from lecture notes on the paper",
        assumptions="Weak: the notes do not say whether the 4M or the 14M image set took 3 to 4 days. The code uses no "
        f"mixed precision, so TF32 is assumed. {_STARTS}",
    ),
    Reference(
        name="UNITER-base",
        device="V100",
        spec="V100-SXM",
        device_hours=(882.0, 882.0),
        how="quoted",
        precision="half",
        source="V100 hours as secondary notes quote Chen et al., arXiv:1909.11740; "
        "github.com/ChenRocks/UNITER (config/pretrain-alldata-base-8gpu.json: 200k steps, fp16)",
        assumptions=f"{_REGIONS} {_STARTS}",
    ),
    Reference(
        name="UNITER-large",
        device="V100",
        spec="V100-SXM",
        device_hours=(3645.0, 3645.0),
        how="quoted",
        precision="half",
        params=303_000_000,
        source="V100 hours as secondary notes quote Chen et al., arXiv:1909.11740; "
        "github.com/ChenRocks/UNITER (config/pretrain-alldata-large-16gpu.json: 500k steps)",
        assumptions=f"{_REGIONS} 16-bit products are assumed, as in the base configuration. {_STARTS}",
    ),
    Reference(
        name="LXMERT",
        device="4 consumer GPUs (Titan Xp, RTX 2080 or Titan V)",
        spec=None,
        device_hours=(816.0, 816.0),
        how="derived",
        source="github.com/airsplay/lxmert (README: 8.5 days on 4 GPUs)",
        assumptions=f"No FLOPs: the cards are not stated exactly. {_REGIONS}",
    ),
    Reference(
        name="BLIP-2 (ViT-g + FlanT5-XXL, both frozen)",
        device="16 x A100 40 GB",
        spec="A100-SXM",
        device_hours=(3456.0, 3456.0),
        how="derived",
        precision="half",
        params=12_100_000_000,
        samples=250_000 * 1680 + 80_000 * 1520,
        source="Li et al., arXiv:2301.12597, 'Pre-training settings' (less than 6 and less than 3 days on 16 A100), "
        "as secondary notes quote it",
        assumptions="The stated times are upper bounds, so the true ratio is higher. 108M of 12.1B parameters train; "
        f"16-bit products are assumed. {_STARTS}",
    ),
    Reference(
        name="LLaVA-1.5 7B",
        device="8 x A100",
        spec="A100-SXM",
        device_hours=(108.0, 108.0),
        how="derived",
        precision="half",
        params=7_000_000_000,
        samples=558_000 + 665_000,
        source="github.com/haotian-liu/LLaVA (README: 3.5 h alignment and 10 h tuning on 8 A100; scripts/v1_5: bf16)",
        assumptions=f"A decoder, not a dual-stream encoder: another kind of model. {_STARTS}",
    ),
    Reference(
        name="LLaVA-1.5 13B",
        device="8 x A100 80 GB",
        spec="A100-SXM",
        device_hours=(204.0, 204.0),
        how="derived",
        precision="half",
        params=13_000_000_000,
        samples=558_000 + 665_000,
        source="github.com/haotian-liu/LLaVA (README: 5.5 h alignment and 20 h tuning on 8 A100; scripts/v1_5: bf16)",
        assumptions=f"A decoder, not a dual-stream encoder: another kind of model. {_STARTS}",
    ),
    Reference(
        name="nanoVLM 222M",
        device="1 x H100",
        spec="H100-SXM",
        device_hours=(6.0, 6.0),
        how="quoted",
        precision="half",
        params=222_000_000,
        samples=1_700_000,
        source="github.com/huggingface/nanoVLM (README: about 6 h on one H100 for about 1.7M samples)",
        assumptions="The cheapest known full recipe of its kind; a decoder. Form factor of the H100 is not stated and "
        f"16-bit products are assumed. {_STARTS}",
    ),
)
"""Runs that a CVLM run is compared with: they, too, turn pretrained parts into a vision-language model."""

_ENCODER = (
    "Pretraining of dual encoders. A ratio against it would mean nothing, because CVLM may start from such encoders: "
    "this is the cost that the comparison leaves out on both sides."
)

ENCODER_RUNS: tuple[Reference, ...] = (
    Reference(
        name="OpenCLIP ViT-B/32 (LAION-400M)",
        device="128 x A100 40 GB",
        spec="A100-SXM",
        device_hours=(4600.0, 4600.0),
        how="quoted",
        source="github.com/mlfoundations/open_clip (docs/PRETRAINED.md)",
        assumptions=_ENCODER,
    ),
    Reference(
        name="OpenCLIP ViT-B/16 (LAION-400M)",
        device="176 x A100 40 GB",
        spec="A100-SXM",
        device_hours=(10700.0, 10700.0),
        how="quoted",
        source="github.com/mlfoundations/open_clip (docs/PRETRAINED.md)",
        assumptions=_ENCODER,
    ),
    Reference(
        name="OpenCLIP ViT-L/14 (LAION-400M)",
        device="400 x A100 40 GB",
        spec="A100-SXM",
        device_hours=(50800.0, 50800.0),
        how="quoted",
        source="github.com/mlfoundations/open_clip (docs/PRETRAINED.md)",
        assumptions=_ENCODER,
    ),
    Reference(
        name="CLIP ViT-L/14 (WIT-400M)",
        device="256 x V100",
        spec="V100-SXM",
        device_hours=(73728.0, 73728.0),
        how="derived",
        params=428_000_000,
        samples=32 * 400_000_000,
        source="Radford et al., arXiv:2103.00020 (256 V100 for 12 days, 32 epochs of 400M pairs)",
        assumptions=_ENCODER,
    ),
)
"""What encoders that CVLM may start from cost to pretrain: for the reader, never for a ratio."""


def compare(total: PhaseCost, references: Sequence[Reference]) -> list[dict[str, Any]]:
    """Set a run's total beside published runs.

    Args:
        total: Cost of the run.
        references: Published runs.

    Returns:
        One object per run, as cost.json holds them. Ratios are ours / theirs; None where either side is unknown or
        nothing was counted. Theirs is the middle of the published or estimated range.
    """
    return [_row(total, reference) for reference in references]


def _row(total: PhaseCost, reference: Reference) -> dict[str, Any]:
    span = reference.flops_range
    flops = None if span is None else sum(span) / 2
    ours = total.device_seconds / 3600
    return {
        "name": reference.name,
        "kind": "published",
        "device_hours": reference.mid_device_hours,
        "flops": flops,
        "ratio_flops": total.flops / flops if flops and total.flops else None,
        "ratio_device_hours": ours / reference.mid_device_hours if ours else None,
        "source": reference.source,
        "assumptions": " ".join(_notes(total, reference, span)),
    }


def _notes(total: PhaseCost, reference: Reference, span: tuple[float, float] | None) -> list[str]:
    notes = [reference.assumptions]
    low, high = reference.device_hours
    if low != high:
        notes.append(f"Device-hours: middle of {low:g} to {high:g}.")
    if reference.how == "derived":
        notes.append("Device-hours are derived: devices x wall time.")
    if span is not None and reference.derived_flops is None:
        shares = f"{UTILISATION[0]:.0%} to {UTILISATION[1]:.0%}"
        notes.append(
            f"FLOPs are derived: assumes utilisation, {shares} of the dense {reference.precision} peak, so "
            f"{span[0]:.2g} to {span[1]:.2g}; the middle is used."
        )
    if total.device and not _same_family(total.device, reference):
        notes.append(
            f"Unlike devices: {_kind(total.device)} hours beside hours of {reference.device}; the ratio of "
            "device-hours compares bills, not work."
        )
    return notes


def _same_family(device: str, reference: Reference) -> bool:
    if reference.spec is None:
        return False
    specs = [find_device(name) for name in device.split(" + ")]
    return all(spec is not None and spec.family == DEVICES[reference.spec].family for spec in specs)


def _kind(device: str) -> str:
    specs = [find_device(name) for name in device.split(" + ")]
    return " + ".join(spec.family if spec else name for spec, name in zip(specs, device.split(" + "), strict=True))
