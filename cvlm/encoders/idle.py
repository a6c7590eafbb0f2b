"""Take out what does not reach the tokens: poolers, projections, a norm behind the chosen layer.

Such parts would be counted, stored and, in distributed training, waited for, without ever having an effect.
"""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn


class Idle(nn.Module):
    """Stands where an unused module was; hands its first argument on."""

    def forward(self, first: Any, *_: Any, **__: Any) -> Any:
        """Return the first argument."""
        return first


def drop_idle(model: nn.Module, run: Callable[[], Tensor]) -> None:
    """Replace every module by `Idle` whose parameters all have no path to the tokens.

    Args:
        model: the network, changed in place.
        run: computes tokens from it in a deterministic way. It runs twice: if dropping changes the tokens, a module
            without trained influence had another one, and all of them come back.
    """
    with torch.enable_grad():
        before = run()
    used = _reached(before)
    dropped = [
        (parent, name, child)
        for parent, name, child in _idle_modules(model, used)
        if not isinstance(child, nn.ModuleList | nn.ModuleDict)
    ]
    for parent, name, _ in dropped:
        parent._modules[name] = Idle()
    if not dropped:
        return
    with torch.no_grad():
        same = torch.equal(before.detach(), run())
    if not same:
        for parent, name, child in dropped:
            parent._modules[name] = child


def _reached(output: Tensor) -> set[int]:
    """Walk the autograd graph backwards and return the ids of the parameters in it, without computing gradients."""
    found: set[int] = set()
    seen: set[Any] = set()
    stack: list[Any] = [output.grad_fn]
    while stack:
        node = stack.pop()
        if node is None or node in seen:
            continue
        seen.add(node)
        if hasattr(node, "variable"):
            found.add(id(node.variable))
        stack.extend(parent for parent, _ in node.next_functions)
    return found


def _idle_modules(module: nn.Module, used: set[int]) -> list[tuple[nn.Module, str, nn.Module]]:
    """List the outermost modules without any used parameter, with their parents and names."""
    found: list[tuple[nn.Module, str, nn.Module]] = []
    for name, child in module.named_children():
        parameters = list(child.parameters())
        # A parameter that asks for no gradient (a fixed position table) leaves no trace in the graph.
        if parameters and all(item.requires_grad and id(item) not in used for item in parameters):
            found.append((module, name, child))
        else:
            found.extend(_idle_modules(child, used))
    return found
