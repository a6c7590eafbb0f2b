"""The cost of a run, phase by phase, beside the published cost of pretraining a vision-language model.

Names are loaded on first use, so that reading a ledger does not import torch.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from cvlm.cost.devices import DEVICES, DeviceSpec, find_device
    from cvlm.cost.flops import attention_flops, count_flops, linear_flops, training_flops, transformer_layer_flops
    from cvlm.cost.ledger import Ledger
    from cvlm.cost.machine import machine_info
    from cvlm.cost.meter import PhaseMeter
    from cvlm.cost.phase import PhaseCost, merge_ranks
    from cvlm.cost.references import ENCODER_RUNS, PRETRAINING_RUNS, Reference, compare

_HOMES = {
    "DEVICES": "devices",
    "DeviceSpec": "devices",
    "find_device": "devices",
    "attention_flops": "flops",
    "count_flops": "flops",
    "linear_flops": "flops",
    "training_flops": "flops",
    "transformer_layer_flops": "flops",
    "Ledger": "ledger",
    "machine_info": "machine",
    "PhaseMeter": "meter",
    "PhaseCost": "phase",
    "merge_ranks": "phase",
    "ENCODER_RUNS": "references",
    "PRETRAINING_RUNS": "references",
    "Reference": "references",
    "compare": "references",
}

__all__ = [
    "DEVICES",
    "ENCODER_RUNS",
    "PRETRAINING_RUNS",
    "DeviceSpec",
    "Ledger",
    "PhaseCost",
    "PhaseMeter",
    "Reference",
    "attention_flops",
    "compare",
    "count_flops",
    "find_device",
    "linear_flops",
    "machine_info",
    "merge_ranks",
    "training_flops",
    "transformer_layer_flops",
]


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module 'cvlm.cost' has no attribute {name!r}")
    return getattr(import_module(f"cvlm.cost.{_HOMES[name]}"), name)
