"""Objectives over the words of captions: labels and logits, by hand; every other one on logits is refused by name."""

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from distill.errors import DistillError
from distill.objectives import OBJECTIVES, build_objective, check_requirements
from distill.signal import Signal

LABELS = torch.tensor([[4, 1, 2, -100], [3, 2, -100, -100], [-100, -100, -100, -100]])


def logits(seed: int) -> Tensor:
    return torch.randn(3, 4, 6, generator=torch.Generator().manual_seed(seed)).requires_grad_()


@pytest.mark.parametrize("kind", ["labels", "logits"])
class TestBoth:
    def test_words_are_counted(self, kind: str) -> None:
        objective = build_objective(kind)
        total, count = objective(Signal(word_logits=logits(0)), Signal(word_logits=logits(1)), LABELS)
        assert objective.count(LABELS, 3) == int(count) == 5
        assert total > 0

    def test_captions_add_up(self, kind: str) -> None:
        objective = build_objective(kind)
        one, other = logits(0), logits(1)
        whole, _ = objective(Signal(word_logits=one), Signal(word_logits=other), LABELS)
        parts = [
            objective(Signal(word_logits=one[i : i + 1]), Signal(word_logits=other[i : i + 1]), LABELS[i : i + 1])[0]
            for i in range(3)
        ]
        torch.testing.assert_close(sum(parts), whole)

    def test_places_without_a_word_get_no_gradient(self, kind: str) -> None:
        one = logits(0)
        total, _ = build_objective(kind)(Signal(word_logits=one), Signal(word_logits=logits(1)), LABELS)
        total.backward()
        assert one.grad is not None
        moved = one.grad.abs().sum(-1) > 0
        assert torch.equal(moved, LABELS >= 0)

    def test_a_batch_without_words_keeps_the_graph(self, kind: str) -> None:
        one = logits(0)
        total, count = build_objective(kind)(Signal(word_logits=one), Signal(word_logits=logits(1)), LABELS[[2, 2, 2]])
        total.backward()
        assert (float(total.detach()), int(count)) == (0, 0)
        assert one.grad is not None
        assert not one.grad.any()


def test_labels_are_cross_entropy_per_word() -> None:
    one = logits(0)
    total, _ = build_objective("labels")(Signal(word_logits=one), None, LABELS)
    chosen = [(0, 0, 4), (0, 1, 1), (0, 2, 2), (1, 0, 3), (1, 1, 2)]
    expected = -sum(F.log_softmax(one[row, place], -1)[word] for row, place, word in chosen)
    torch.testing.assert_close(total, expected)


def test_logits_are_a_divergence_per_word() -> None:
    one, other = logits(0), logits(1)
    total, _ = build_objective("logits", temperature=3.0)(Signal(word_logits=one), Signal(word_logits=other), LABELS)
    expected = sum(
        9 * F.kl_div(F.log_softmax(one[i, j] / 3, -1), F.softmax(other[i, j] / 3, -1), reduction="sum")
        for i, j in (LABELS >= 0).nonzero().tolist()
    )
    torch.testing.assert_close(total, expected)
    same, _ = build_objective("logits")(Signal(word_logits=one), Signal(word_logits=one), LABELS)
    assert float(same.detach()) == pytest.approx(0, abs=1e-6)


def test_other_objectives_on_answers_are_refused_by_name() -> None:
    captioner = frozenset({"word_logits", "hidden", "text_to_image", "text_layout", "image_layout"})
    needs = {kind: build_objective(kind).missing(captioner, captioner)["student"] for kind in OBJECTIVES}
    allowed = {kind for kind, missing in needs.items() if not missing}
    assert {"labels", "logits", "cross_attention", "hidden"} <= allowed
    assert not {kind for kind in allowed - {"labels", "logits"} if "logits" in build_objective(kind).student_needs}
    for kind in OBJECTIVES.keys() - allowed:
        with pytest.raises(DistillError, match=f"objective '{kind}' needs"):
            check_requirements([build_objective(kind)], captioner, captioner, "(captioner)")
    with pytest.raises(DistillError, match=r"'logits' needs word_logits of the teacher \(vqa\)"):
        check_requirements([build_objective("logits")], captioner, frozenset({"logits"}), "(vqa)")
