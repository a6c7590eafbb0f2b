"""What a contrastive teacher offers a contrastive student: its embeddings and its similarities."""

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from distill.errors import DistillError
from distill.objectives.answers import check_positive
from distill.objectives.base import Loss, Objective, zero_like
from distill.objectives.response import softmax_kl
from distill.objectives.states import adapt, single_precision
from distill.signal import Signal

PARTS = ("feature", "interactive", "similarity")
MODALITIES = ("image_embedding", "text_embedding")


class Contrastive(Objective):
    """Three parts of CLIP-KD (Yang et al. 2024, section 3), summed:

    - `feature`: the mean of squared differences of both models' unit embeddings, of pictures plus of texts;
    - `interactive`: InfoNCE of the student's pictures against the teacher's texts and of its texts against the
      teacher's pictures, averaged; pairs with the same label are positives of each other. Its scale starts at
      `1 / 0.07` and is trained as a logarithm, at most 100. (The authors' code multiplies by the logarithm itself.)
      Its lower bound is the entropy of the target, not zero;
    - `similarity`: `KL(teacher || student)` of the rows and columns of the similarities, averaged. Affinity mimicking
      (TinyCLIP, Wu et al. 2023) is the same less the teacher's entropy, which has no gradient.

    Where the embeddings' widths differ, a linear map of the student's, one per modality, trains along. `interactive`
    and `similarity` see the pairs of one micro-batch.

    Args:
        parts: `feature`, `interactive`, `similarity`, a list of these, or `all`. The first two need embeddings on both
            sides, the third similarities.
        feature_weight: factor of `feature`; the authors' for the mean over dimensions.
        weight: factor of this term.
    """

    kind = "contrastive"
    source = "CLIP-KD (Yang et al. 2024), section 3; TinyCLIP (Wu et al. 2023)"

    def __init__(
        self, *, parts: str | list[str] | tuple[str, ...] = "all", feature_weight: float = 2000.0, weight: float = 1.0
    ) -> None:
        super().__init__(weight=weight)
        chosen = PARTS if parts == "all" else (parts,) if isinstance(parts, str) else tuple(parts)
        if not chosen or not set(chosen) <= set(PARTS):
            raise DistillError(f"objective {self.kind!r}: parts is {parts!r}; use all, or some of {', '.join(PARTS)}")
        check_positive(self, "feature_weight", feature_weight, zero=True)
        self.parts, self.feature_weight = chosen, feature_weight
        self.embeds = bool({"feature", "interactive"} & set(chosen))
        needs = (MODALITIES if self.embeds else ()) + (("similarity",) if "similarity" in chosen else ())
        self.student_needs = self.teacher_needs = frozenset(needs)
        self.maps = nn.ModuleList()
        self.log_scale = nn.Parameter(torch.tensor(math.log(1 / 0.07))) if "interactive" in chosen else None

    def prepare(self, student: Signal, teacher: Signal | None) -> None:
        """Make a map per modality, once; the identity where the widths are equal."""
        if self.embeds and len(self.maps) == 0:
            for s, t in self._embeddings(student, teacher):
                same = s.shape[-1] == t.shape[-1]
                self.maps.append((nn.Identity() if same else nn.Linear(s.shape[-1], t.shape[-1])).to(s.device))

    def forward(self, student: Signal, teacher: Signal | None, labels: Tensor | None = None) -> Loss:
        """Compare embeddings `[b, e]` and similarities `[b, b]`; labels only say which pairs are the same."""
        self.prepare(student, teacher)
        total, count = torch.zeros(()), 0
        if self.embeds:
            (image, image_t), (text, text_t) = self._embeddings(student, teacher)
            image, text = (
                F.normalize(adapt(part, s), dim=-1) for part, s in zip(self.maps, (image, text), strict=True)
            )
            total, count = zero_like(image) + zero_like(text), len(image)
            if "feature" in self.parts:
                differences = (image - image_t).square().mean(-1) + (text - text_t).square().mean(-1)
                total = total + self.feature_weight * differences.sum()
            if self.log_scale is not None:
                scale = self.log_scale.float().clamp(max=math.log(100)).exp()
                target = _positives(labels, len(image), image.device)
                with single_precision(image):
                    scores = scale * image @ text_t.T, scale * text @ image_t.T
                total = total - sum((target * F.log_softmax(score, dim=-1)).sum() for score in scores) / 2
        if "similarity" in self.parts:
            s, t = self.take(student, "student", "similarity"), self.take(teacher, "teacher", "similarity")
            assert isinstance(s, Tensor)
            assert isinstance(t, Tensor)
            rows, columns = softmax_kl(t.detach(), s, 1.0), softmax_kl(t.detach().T, s.T, 1.0)
            total, count = total.to(s.device) + (rows.sum() + columns.sum()) / 2, len(s)
        return total, torch.tensor(count, device=total.device)

    def _embeddings(self, student: Signal, teacher: Signal | None) -> list[tuple[Tensor, Tensor]]:
        """Return both sides' embeddings of pictures and of texts; the teacher's are unit vectors and detached."""
        found = []
        for field in MODALITIES:
            s, t = self.take(student, "student", field), self.take(teacher, "teacher", field)
            assert isinstance(s, Tensor)
            assert isinstance(t, Tensor)
            found.append((s, F.normalize(t.detach().float(), dim=-1)))
        return found


def _positives(labels: Tensor | None, pairs: int, device: torch.device) -> Tensor:
    """Return `[b, b]` target rows: even over the pairs with the same label, else the pair itself."""
    same = torch.eye(pairs, dtype=torch.bool, device=device)
    if labels is not None and labels.dim() == 1:
        same = same | ((labels[:, None] == labels) & (labels >= 0))
    return same / same.sum(-1, keepdim=True)
