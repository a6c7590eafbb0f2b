"""How examples relate to each other: widths may differ, because only relations within a model are compared.

A relation belongs to a micro-batch, not to an example. `(sum, count)` is the published mean over the micro-batch's
relations times its number of examples, and that number. Dividing gives the published value for one micro-batch; with
gradient accumulation or several processes, the mean of theirs weighted by examples. Relations across micro-batches
are not seen. Examples without a word in common do not take part.
"""

import math
from typing import ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from distill.alignment import LayerMap
from distill.errors import DistillError
from distill.objectives.answers import check_choice, check_positive, check_whole
from distill.objectives.base import Loss, zero_like
from distill.objectives.states import StateObjective, single_precision
from distill.signal import Signal


class RelationalObjective(StateObjective):
    """An objective on relations between the examples of a micro-batch.

    A micro-batch of fewer examples than a relation takes gives zero and counts nothing.
    """

    smallest: ClassVar[int] = 2

    def __init__(self, *, states: str = "pooled", layers: LayerMap = "last", weight: float = 1.0) -> None:
        super().__init__(states=states, layers=layers, weight=weight)

    def relate(self, student: Tensor, teacher: Tensor) -> Tensor:
        """Compare the relations among `[n, d_s]` with those among `[n, d_t]`: the published mean, a scalar."""
        raise NotImplementedError

    def forward(self, student: Signal, teacher: Signal | None, labels: Tensor | None = None) -> Loss:
        """Compare the relations within the batch; labels play no part."""
        values, taking_part = [], 0
        for s, t, _ in self.vectors(student, teacher):
            taking_part = len(s) if len(s) >= self.smallest else 0
            with single_precision(s):
                values.append(self.relate(s, t) * len(s) if taking_part else zero_like(s))
        return torch.stack(values).mean(), torch.tensor(taking_part, device=values[0].device)


class ProbabilisticTransfer(RelationalObjective):
    """Divergence of the student's neighbourhoods from the teacher's (PKT, Passalis and Tefas 2018).

    Each example has a distribution over the examples of the batch, `(cos + 1) / 2` scaled to one; the value is the mean
    over examples of `KL(teacher || student)`. The paper leaves an example out of its own neighbourhood; the authors'
    code, which every implementation follows, keeps it in, and so does this one.
    """

    kind = "pkt"
    source = "PKT (Passalis and Tefas 2018), KL of cosine affinities"

    def relate(self, student: Tensor, teacher: Tensor) -> Tensor:
        """See the class."""
        p_s, p_t = _neighbourhoods(student), _neighbourhoods(teacher)
        floor = 1e-7  # of the authors' code: a distribution may be zero where two vectors are opposite
        return (p_t * ((p_t + floor) / (p_s + floor)).log()).sum(1).mean()


def _neighbourhoods(states: Tensor) -> Tensor:
    unit = F.normalize(states, dim=-1)
    affinity = ((unit @ unit.T + 1) / 2).clamp_min(0)
    return affinity / affinity.sum(1, keepdim=True)


class Relational(RelationalObjective):
    """Distances between pairs and angles within triplets of examples (RKD, Park et al. 2019, sections 3.2.1 and 3.2.2).

    Distances are divided by their mean over the batch's pairs of different vectors; an angle is the cosine at one
    example between the directions to two others. Both are compared by smooth L1, averaged over all `n^2` pairs and
    `n^3` triplets. The angles of a few vertices are computed at a time, and again in the backward pass, so memory
    grows with `n^2`.

    Args:
        states: see `StateObjective`.
        layers: layer map for `hidden` and `cls`.
        distance: factor of the distances.
        angle: factor of the angles; they need three examples.
        weight: factor of this term.
    """

    kind = "relational"
    source = "RKD (Park et al. 2019), sections 3.2.1 and 3.2.2"

    def __init__(
        self,
        *,
        states: str = "pooled",
        layers: LayerMap = "last",
        distance: float = 25.0,
        angle: float = 50.0,
        weight: float = 1.0,
    ) -> None:
        super().__init__(states=states, layers=layers, weight=weight)
        if not (0 <= distance < math.inf and 0 <= angle < math.inf and distance + angle > 0):
            raise DistillError(
                f"objective {self.kind!r}: distance is {distance} and angle is {angle}; both must be finite and not "
                "negative, and one of them above 0"
            )
        self.distance, self.angle = distance, angle

    def relate(self, student: Tensor, teacher: Tensor) -> Tensor:
        """See the class."""
        value = zero_like(student)
        if self.distance:
            value = value + self.distance * F.smooth_l1_loss(_distances(student), _distances(teacher))
        if self.angle and len(student) >= 3:
            value = value + self.angle * _angle_loss(student, teacher)
        return value


def _distances(states: Tensor) -> Tensor:
    """Euclidean distances `[n, n]` over their mean; differences are taken first, which loses no digits."""
    distances = torch.cdist(states, states, compute_mode="donot_use_mm_for_euclid_dist")
    mean = distances.sum() / (distances > 0).sum().clamp_min(1)
    return distances / mean.clamp_min(torch.finfo(states.dtype).tiny)


def _angle_loss(student: Tensor, teacher: Tensor, vertices: int = 8) -> Tensor:
    def part(start: int, s: Tensor, t: Tensor) -> Tensor:
        angles = _angles(s, s[start : start + vertices]), _angles(t, t[start : start + vertices])
        return F.smooth_l1_loss(*angles, reduction="sum")

    parts = [
        torch.as_tensor(checkpoint(part, start, student, teacher, use_reentrant=False, preserve_rng_state=False))
        for start in range(0, len(student), vertices)
    ]
    return torch.stack(parts).sum() / len(student) ** 3


def _angles(states: Tensor, vertices: Tensor) -> Tensor:
    """Cosines `[v, n, n]` at each of the vertices `[v, d]` between the directions to any two of `[n, d]`."""
    directions = F.normalize(states[None] - vertices[:, None], dim=-1)
    return directions @ directions.transpose(1, 2)


class SimilarityPreserving(RelationalObjective):
    """Pairwise similarities of a batch (SPKD, Tung and Mori 2019, section 3): the mean over all `n^2` pairs of the
    squared difference between the entries of `Q Q^T`, each row of which is scaled to length one.
    """

    kind = "similarity_preserving"
    source = "SPKD (Tung and Mori 2019), section 3"

    def relate(self, student: Tensor, teacher: Tensor) -> Tensor:
        """See the class."""
        g_s, g_t = (F.normalize(states @ states.T, dim=1) for states in (student, teacher))
        return (g_s - g_t).square().mean()


KERNELS = ("gaussian", "bilinear")


class Correlation(RelationalObjective):
    """Correlation congruence (CC, Peng et al. 2019): the mean over all `n^2` pairs of the squared difference
    between the two models' kernel values.

    Vectors are scaled to length one, so that kernels of models of different width compare without a learned map. The
    kernel is the paper's Gaussian in its Taylor form,
    `exp(-2 gamma) sum_{p <= order} (2 gamma)^p / p! cos^p`, or bilinear, the cosine itself. Another loss passes under
    the same name: RepDistiller's compares differences of neighbours in the batch.

    Args:
        states: see `StateObjective`.
        layers: layer map for `hidden` and `cls`.
        kernel: `gaussian` or `bilinear`.
        gamma: width of the Gaussian.
        order: last term of its Taylor series.
        weight: factor of this term.
    """

    kind = "correlation"
    source = "CC (Peng et al. 2019), Gaussian kernel in Taylor form"

    def __init__(
        self,
        *,
        states: str = "pooled",
        layers: LayerMap = "last",
        kernel: str = "gaussian",
        gamma: float = 0.4,
        order: int = 2,
        weight: float = 1.0,
    ) -> None:
        super().__init__(states=states, layers=layers, weight=weight)
        check_choice(self, "kernel", kernel, KERNELS)
        check_positive(self, "gamma", gamma)
        check_whole(self, "order", order, least=1)
        self.kernel, self.gamma, self.order = kernel, gamma, order

    def relate(self, student: Tensor, teacher: Tensor) -> Tensor:
        """See the class."""
        return (self._kernel(student) - self._kernel(teacher)).square().mean()

    def _kernel(self, states: Tensor) -> Tensor:
        unit = F.normalize(states, dim=-1)
        cosines = unit @ unit.T
        if self.kernel == "bilinear":
            return cosines
        terms = [(2 * self.gamma * cosines) ** p / math.factorial(p) for p in range(self.order + 1)]
        return math.exp(-2 * self.gamma) * torch.stack(terms).sum(0)
