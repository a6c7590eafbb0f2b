"""What each term of a loss weighs in a step: its schedule, times what balancing makes of it."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from cvlm.config import PhaseSpec
from cvlm.errors import CvlmError
from distill import Objective
from distill.schedule import weight_at

BALANCE_EVERY = 10
"""Steps between two measurements; each costs a backward pass per term down to the shared parameters."""

SMOOTHING = 0.9
"""How much of the old factor a measurement leaves."""


@dataclass(frozen=True, kw_only=True)
class StepPlan:
    """What happens in which optimiser step; counted from 0, and known before the first one.

    Attributes:
        steps: number of steps of the phase.
        log_every: steps between two records of the log.
        log_gradients: whether records hold each term's share of the gradient.
        balance: whether weights follow the gradients' norms.
    """

    steps: int
    log_every: int
    log_gradients: bool = False
    balance: bool = False

    @classmethod
    def of(cls, phase: PhaseSpec, steps: int, log_every: int) -> "StepPlan":
        """Return the plan of a phase."""
        return cls(
            steps=steps, log_every=log_every, log_gradients=phase.log_gradients, balance=phase.balance is not None
        )

    def progress(self, step: int) -> float:
        """Return the share of the phase that is done before a step."""
        return step / self.steps

    def measures(self, step: int) -> bool:
        """Tell whether gradients are measured in a step: where one is logged, and where weights are balanced."""
        logged = self.log_gradients and (step + 1) % self.log_every == 0
        return logged or self.rebalances(step)

    def rebalances(self, step: int) -> bool:
        """Tell whether weights are balanced behind a step."""
        return self.balance and step % BALANCE_EVERY == 0

    def active(self, objectives: Sequence[Objective], step: int) -> tuple[bool, ...]:
        """Tell which terms are computed in a step: those whose weight is not 0.

        Raises:
            CvlmError: no term is.
        """
        found = tuple(weight_at(objective.weight, self.progress(step)) > 0 for objective in objectives)
        if not any(found):
            raise CvlmError(
                f"every objective has weight 0 in step {step + 1} of {self.steps}, so nothing would be learned; let "
                "one schedule begin where another ends"
            )
        return found


class TermWeights(nn.Module):
    """The weights of a phase's terms, scheduled and, if asked for, balanced.

    Balancing follows the idea of GradNorm (Chen et al. 2018) with less: each term's factor is the first term's gradient
    norm divided by its own, at the same parameters, so the given weight says how strong a term's gradient is compared
    with the first one's. GradNorm also learns how fast terms should fall; this does not. Norms are of the last
    micro-batch of every `BALANCE_EVERY`-th step, averaged over processes; factors keep `SMOOTHING` of their old value
    and stand in checkpoints, so that resuming meets the same weights. A step in which the first term is not computed
    changes nothing.

    Args:
        objectives: the terms.
        names: of the terms.
        balance: whether weights follow the gradients' norms.
    """

    factors: Tensor

    def __init__(self, objectives: Sequence[Objective], names: Sequence[str], *, balance: bool = False) -> None:
        super().__init__()
        self._schedules = [objective.weight for objective in objectives]
        self._names = list(names)
        self._balance = balance
        self.progress = 0.0
        if balance:
            # 0 stands for a term that was never measured.
            self.register_buffer("factors", torch.zeros(len(names)))

    def values(self) -> list[float]:
        """Return the weight of every term now."""
        given = [weight_at(weight, self.progress) for weight in self._schedules]
        if not self._balance:
            return given
        return [weight * (factor or 1.0) for weight, factor in zip(given, self.factors.tolist(), strict=True)]

    def rebalance(self, norms: Mapping[str, float]) -> None:
        """Follow the norms of the terms' unweighted gradients; terms that were not measured keep their factors."""
        first = norms.get(self._names[0], 0.0)
        for place, name in enumerate(self._names):
            norm = norms.get(name, 0.0)
            if not (0 < norm < math.inf and 0 < first < math.inf):
                continue
            old = float(self.factors[place])
            new = first / norm
            self.factors[place] = new if old == 0 else SMOOTHING * old + (1 - SMOOTHING) * new


def gradient_norm(value: Tensor, parameters: Sequence[nn.Parameter]) -> Tensor:
    """Return the norm of a term's gradient at some parameters; 0 where it does not reach them. The graph is kept."""
    if not value.requires_grad or not parameters:
        return torch.zeros((), device=value.device)
    found = torch.autograd.grad(value, list(parameters), retain_graph=True, allow_unused=True)
    squares = [gradient.float().square().sum() for gradient in found if gradient is not None]
    return torch.stack(squares).sum().sqrt() if squares else torch.zeros((), device=value.device)
