"""Logit distillation against torchdistill, another library's implementation of Hinton et al. (2015)."""

import pytest
import torch

from distill.objectives import build_objective
from distill.signal import Signal

B, ANSWERS = 18, 37


@pytest.mark.parametrize("temperature", [1.0, 2.0, 5.0])
@pytest.mark.parametrize("alpha", [0.1, 0.5])
def test_labels_and_logits_equal_torchdistills_kd_loss(temperature, alpha):
    losses = pytest.importorskip("torchdistill.losses.mid_level")
    generator = torch.Generator().manual_seed(0)
    z_s = (torch.randn(B, ANSWERS, generator=generator) * 3).requires_grad_()
    z_t = torch.randn(B, ANSWERS, generator=generator) * 3
    labels = torch.randint(ANSWERS, (B,), generator=generator)

    kd = losses.KDLoss("head", "output", "head", "output", temperature=temperature, alpha=alpha)
    theirs = kd({"head": {"output": z_s}}, {"head": {"output": z_t}}, labels)

    student, teacher = Signal(logits=z_s), Signal(logits=z_t)
    hard, labelled = build_objective("labels")(student, None, labels)
    soft, compared = build_objective("logits", temperature=temperature)(student, teacher)
    ours = alpha * hard / labelled + (1 - alpha) * soft / compared

    torch.testing.assert_close(ours, theirs)
    torch.testing.assert_close(torch.autograd.grad(ours, z_s), torch.autograd.grad(theirs, z_s))
