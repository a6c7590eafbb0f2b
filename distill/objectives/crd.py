"""Contrastive representation distillation: the student's vector picks out the teacher's of the same example."""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from distill.objectives.answers import check_positive, check_whole
from distill.objectives.base import Loss
from distill.objectives.states import StateObjective, adapt, single_precision
from distill.signal import Signal

UNKNOWN = -100
"""Class of an example without a label."""


class ContrastiveRepresentation(StateObjective):
    """Noise-contrastive estimation between both models' vectors (CRD, Tian et al. 2020, section 3).

    Both sides are mapped linearly to unit vectors, and with `h = e^(cos / T) / (e^(cos / T) + M Z)` an example costs
    `-log h(positive) - sum log(1 - h(negative))` over its `M` negatives: once with the student as anchor against
    vectors of the teacher, once the other way round. `Z` is the mean of `e^(cos / T)` over the first batch and stays,
    as in the authors' code; both maps train along.

    The authors keep a vector of every training example in a bank and draw negatives from it by index. A step here knows
    no index, so negatives are the other examples of the micro-batch and a queue of the vectors of earlier ones (He et
    al. 2020), and the positive is the other side's vector of this moment. Examples with the same label are no negatives
    of each other, as in the paper. An unlabelled example may meet its own vector of an earlier epoch in the queue:
    keep the queue well below the number of pairs.

    Args:
        states: `pooled`, `hidden` or `cls` of the last layers, `image_embedding` or `text_embedding`.
        dimensions: width of the common space.
        queue: how many earlier vectors of each side are kept; 0 keeps none.
        temperature: T.
        weight: factor of this term; 0.8 in the authors' experiments.
    """

    kind = "crd"
    source = "CRD (Tian et al. 2020), section 3"

    vectors_kept: Tensor
    labels_kept: Tensor
    position: Tensor
    partition: Tensor

    def __init__(
        self,
        *,
        states: str = "pooled",
        dimensions: int = 128,
        queue: int = 1024,
        temperature: float = 0.07,
        weight: float = 1.0,
    ) -> None:
        super().__init__(states=states, weight=weight)
        check_whole(self, "dimensions", dimensions, least=2)
        check_whole(self, "queue", queue, least=0)
        check_positive(self, "temperature", temperature)
        self.dimensions, self.queue, self.temperature = dimensions, queue, temperature
        self.maps = nn.ModuleList()
        self.register_buffer("vectors_kept", torch.zeros(2, queue, dimensions))
        self.register_buffer("labels_kept", torch.full((queue,), UNKNOWN))
        self.register_buffer("position", torch.zeros((), dtype=torch.long))  # vectors ever put into the queue
        self.register_buffer("partition", torch.zeros(2))  # Z per side; 0 until the first batch

    def prepare(self, student: Signal, teacher: Signal | None) -> None:
        """Make both sides' maps, once, and fill the queue with random unit vectors, as the authors fill their bank.

        So the number of negatives, on which the value depends, is the same from the first step on.
        """
        if len(self.maps) == 0:
            self.vectors_kept.copy_(F.normalize(torch.randn(self.vectors_kept.shape), dim=-1))
            for side in self.vectors(student, teacher)[0][:2]:
                self.maps.append(nn.Linear(side.shape[-1], self.dimensions).to(side.device))

    def forward(self, student: Signal, teacher: Signal | None, labels: Tensor | None = None) -> Loss:
        """Contrast the batch; in training mode, put it into the queue afterwards."""
        self.prepare(student, teacher)
        ((*states, present),) = self.vectors(student, teacher)
        ours, theirs = (F.normalize(adapt(part, s), dim=-1) for part, s in zip(self.maps, states, strict=True))
        classes = _classes(labels, len(present), present.device)[present]
        negatives = self._negatives(classes)
        with single_precision(ours):
            loss = self._contrast(0, ours, theirs, negatives) + self._contrast(1, theirs, ours, negatives)
        if self.training:
            self._enqueue(torch.stack([ours, theirs]).detach(), classes)
        return loss, torch.tensor(len(ours), device=ours.device)

    def _negatives(self, classes: Tensor) -> Tensor:
        """Say which candidates are negatives: `[n, n + queue]`, the batch first."""
        others = torch.cat([classes, self.labels_kept])
        same = (classes[:, None] == others) & (classes[:, None] != UNKNOWN)
        itself = F.pad(torch.eye(len(classes), dtype=torch.bool, device=classes.device), (0, self.queue))
        return ~(same | itself)

    def _contrast(self, side: int, anchors: Tensor, partners: Tensor, negatives: Tensor) -> Tensor:
        """Sum the estimate over `[n, d]` anchors of one side; the other side's vectors are constants."""
        # A copy, because the queue is written to before the backward pass.
        candidates = torch.cat([partners.detach(), self.vectors_kept[1 - side].clone().to(partners)])
        scores = anchors @ candidates.T / self.temperature
        positives = scores.diagonal()
        number = negatives.sum(1)
        log_noise = (number.clamp_min(1) * self._partition(side, scores.detach(), negatives)).log()
        value = F.softplus(log_noise - positives) + (F.softplus(scores - log_noise[:, None]) * negatives).sum(1)
        return (value * (number > 0)).sum()

    def _partition(self, side: int, scores: Tensor, negatives: Tensor) -> Tensor:
        if self.partition[side] > 0 or not negatives.any():
            return self.partition[side].clamp_min(1)
        used = negatives.clone()
        used.fill_diagonal_(True)
        mean = scores.exp()[used].mean()
        if self.training:
            self.partition[side] = mean
        return mean

    def _enqueue(self, vectors: Tensor, classes: Tensor) -> None:
        """Replace the oldest entries by `[2, n, d]` vectors."""
        vectors, classes = vectors[:, -self.queue :], classes[-self.queue :]
        if self.queue:
            slots = (self.position + torch.arange(len(classes), device=classes.device)) % self.queue
            self.vectors_kept[:, slots] = vectors.to(self.vectors_kept)
            self.labels_kept[slots] = classes
            self.position += len(classes)


def _classes(labels: Tensor | None, examples: int, device: torch.device) -> Tensor:
    """Return `[b]` classes; of soft scores the highest, where there is any."""
    if labels is None:
        return torch.full((examples,), UNKNOWN, device=device)
    if labels.dim() == 1:
        return torch.where(labels >= 0, labels.long(), UNKNOWN)
    if not labels.is_floating_point():
        return torch.full((examples,), UNKNOWN, device=device)  # captions have no class
    best, index = labels.max(-1)
    return torch.where(best > 0, index, UNKNOWN)
