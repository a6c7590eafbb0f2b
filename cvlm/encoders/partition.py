"""Which parameters form which layer, and which layers train. One partition serves freezing and layer-wise rates."""

import re
from collections import Counter

from torch import nn

from cvlm.errors import CvlmError

# Registered behind the blocks, but at work in front of them: DeBERTa's relative positions, MPNet's shared bias, the
# norm of BART's embeddings.
INPUT_SIDE = re.compile(r"embed|position|relative_attention_bias|^encoder\.(LayerNorm|conv)\.")


def set_trainable(encoder: nn.Module, mode: str) -> set[str]:
    """Choose which parameters of an encoder receive gradients; parts without any go to eval mode.

    Args:
        encoder: a module with `layers()`, see `Encoder`.
        mode: `frozen`, `full`, or `last_N` for the last N layers.

    Returns:
        The names of the trainable parameters.

    Raises:
        CvlmError: the mode is unknown, asks for more layers than there are, or `layers()` is no partition.
    """
    layers = _checked_layers(encoder)
    if mode == "frozen":
        count = 0
    elif mode == "full":
        count = len(layers)
    elif re.fullmatch(r"last_[1-9][0-9]*", mode):
        count = int(mode.removeprefix("last_"))
    else:
        raise CvlmError(f"train mode {mode!r} is unknown; use frozen, full, or last_N such as last_2")
    if count > len(layers):
        raise CvlmError(f"train mode {mode!r}: the encoder has {len(layers)} layers; use last_{len(layers)} or full")
    trainable = {name for layer in layers[len(layers) - count :] for name in layer}
    for name, parameter in encoder.named_parameters():
        parameter.requires_grad_(name in trainable)
    keep_frozen_in_eval(encoder)
    return trainable


def is_frozen(encoder: nn.Module) -> bool:
    """Tell whether no parameter of the encoder receives gradients."""
    return not any(parameter.requires_grad for parameter in encoder.parameters())


def keep_frozen_in_eval(module: nn.Module) -> None:
    """Put every part of a module whose parameters are all frozen into eval mode.

    BatchNorm statistics are buffers: without this a frozen network drifts as soon as its parent calls `.train()`. The
    towers of this package call it in their own `train`; whoever holds an encoder of another class calls it after
    `.train()`. Parts without parameters, such as a dropout between the layers of a half-trained encoder, follow the
    module that holds them.
    """
    parameters = list(module.parameters())
    if parameters and not any(parameter.requires_grad for parameter in parameters):
        for part in module.modules():
            # Not eval(): that calls train(False), and a `train` that ends on this function would never end.
            part.training = False
        return
    for child in module.children():
        keep_frozen_in_eval(child)


def find_blocks(module: nn.Module) -> tuple[str, nn.ModuleList | nn.Sequential] | None:
    """Find the stack of blocks that a network consists of: its outermost list with the most parameters.

    Returns:
        Name and list, or None if the network holds no list with parameters.
    """
    best: tuple[str, nn.ModuleList | nn.Sequential] | None = None
    most = 0
    for name, child in module.named_modules():
        if name and isinstance(child, nn.ModuleList | nn.Sequential):
            size = sum(parameter.numel() for parameter in child.parameters())
            if size > most:
                best, most = (name, child), size
    return best


def group_by_blocks(module: nn.Module) -> list[list[str]]:
    """Partition the parameter names of a network: embeddings first, then each block.

    What stands behind the last block (a final norm) joins it, as in timm, so that `last_1` always trains a block.
    """
    names = [name for name, _ in module.named_parameters()]
    found = find_blocks(module)
    if found is None:
        return [names] if names else []
    prefix = found[0] + "."
    blocks: dict[str, list[str]] = {child: [] for child, _ in found[1].named_children()}
    stem: list[str] = []
    tail: list[str] = []
    inside = [name.startswith(prefix) for name in names]
    first = inside.index(True)
    for position, name in enumerate(names):
        if inside[position]:
            blocks[name.removeprefix(prefix).split(".")[0]].append(name)
        elif position < first or INPUT_SIDE.search(name):
            stem.append(name)
        else:
            tail.append(name)
    layers = [layer for layer in (stem, *blocks.values()) if layer]
    layers[-1].extend(tail)
    return layers


def layer_index(layer: int, count: int, network: nn.Module) -> int:
    """Return the index of a layer from the front.

    Raises:
        CvlmError: the network has no such layer.
    """
    index = layer + count if layer < 0 else layer
    if not 0 <= index < count:
        raise CvlmError(
            f"layer is {layer}, but {type(network).__name__} has {count} layers; use {-count} to {count - 1}"
        )
    return index


def _checked_layers(encoder: nn.Module) -> list[list[str]]:
    """Return `encoder.layers()` after checking that every parameter stands in exactly one layer."""
    layers: list[list[str]] = encoder.layers()  # type: ignore[operator]
    listed = Counter(name for layer in layers for name in layer)
    names = {name for name, _ in encoder.named_parameters()}
    wrong = sorted((names ^ set(listed)) | {name for name, count in listed.items() if count > 1})
    if wrong:
        raise CvlmError(
            f"{type(encoder).__name__}.layers() must name every parameter exactly once; "
            f"missing, unknown or repeated: {', '.join(wrong[:5])}" + (", ..." if len(wrong) > 5 else "")
        )
    return layers
