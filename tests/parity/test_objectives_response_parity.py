"""Objectives on answers, attention and relations against other libraries, or loops in double precision."""

import math

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from scipy.spatial.distance import cosine, jensenshannon
from scipy.special import rel_entr, softmax
from scipy.stats import entropy
from torch import Tensor
from torchvision.ops import sigmoid_focal_loss

from distill.objectives import build_objective
from distill.signal import Signal

B, ANSWERS = 17, 31
TEMPERATURES = (1.0, 2.5)


def noise(seed: int, *shape: int, scale: float = 3.0) -> Tensor:
    return scale * torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


Z_S, Z_T = noise(0, B, ANSWERS), noise(1, B, ANSWERS)
LABELS = torch.randint(ANSWERS, (B,), generator=torch.Generator().manual_seed(2))


def ours(kind: str, z_s: Tensor = Z_S, labels: Tensor | None = None, **settings) -> float:
    loss, count = build_objective(kind, **settings)(Signal(logits=z_s), Signal(logits=Z_T), labels)
    return float(loss / count)


def p(logits: Tensor, temperature: float = 1.0) -> NDArray[np.float64]:
    return softmax(logits.double().numpy() / temperature, axis=-1)


@pytest.mark.parametrize("temperature", TEMPERATURES)
def test_divergences_against_scipy(temperature):
    p_s, p_t, square = p(Z_S, temperature), p(Z_T, temperature), temperature**2
    forward, reverse = rel_entr(p_t, p_s).sum(-1).mean(), rel_entr(p_s, p_t).sum(-1).mean()
    jsd = (jensenshannon(p_s, p_t, axis=-1) ** 2).mean()
    assert ours("jsd", temperature=temperature) == pytest.approx(square * jsd, rel=1e-5)
    assert ours("jsd", temperature=temperature, beta=0.0) == pytest.approx(square * forward, rel=1e-5)
    assert ours("reverse_kl", temperature=temperature) == pytest.approx(square * reverse, rel=1e-5)
    assert ours("symmetric_kl", temperature=temperature) == pytest.approx(square * (forward + reverse) / 2, rel=1e-5)
    for beta in (0.1, 0.9):
        m = beta * p_t + (1 - beta) * p_s
        expected = (beta * rel_entr(p_t, m) + (1 - beta) * rel_entr(p_s, m)).sum(-1).mean()
        assert ours("jsd", temperature=temperature, beta=beta) == pytest.approx(square * expected, rel=1e-5)
    # The largest difference of the probability of any set of answers: those that the teacher finds likelier.
    gap = np.where(p_t > p_s, p_t - p_s, 0).sum(-1).mean()
    assert ours("tvd", temperature=temperature) == pytest.approx(temperature * gap, rel=1e-5)


@pytest.mark.parametrize("temperature", TEMPERATURES)
def test_logit_standardisation_equals_torchdistill(temperature):
    """Their loss without labels leaves out the factor T^2."""
    losses = pytest.importorskip("torchdistill.losses.mid_level")
    theirs = losses.LogitStdKDLoss("head", "output", "head", "output", temperature=temperature, alpha=0.0)
    z_s = Z_S.clone().requires_grad_()
    expected = temperature**2 * theirs({"head": {"output": z_s}}, {"head": {"output": Z_T}})
    objective = build_objective("jsd", beta=0.0, temperature=temperature, normalise="z_score")
    found = objective(Signal(logits=z_s), Signal(logits=Z_T))[0] / B
    torch.testing.assert_close(found, expected)
    torch.testing.assert_close(torch.autograd.grad(found, z_s), torch.autograd.grad(expected, z_s))


def test_logit_mse_and_entropy_against_torch_and_scipy():
    assert ours("logit_mse") == pytest.approx(torch.nn.functional.mse_loss(Z_S, Z_T).item(), rel=1e-6)
    assert ours("entropy") == pytest.approx(-entropy(p(Z_S), axis=-1).mean(), rel=1e-5)


@pytest.mark.parametrize("gamma", [0.0, 2.0, 5.0])
def test_focal_against_torchvision(gamma):
    """Their sigmoid form with alpha off; the softmax form over two answers z and 0 is the same function."""
    target = torch.nn.functional.one_hot(LABELS, ANSWERS).float()
    expected = sigmoid_focal_loss(Z_S, target, alpha=-1, gamma=gamma, reduction="sum").item() / B
    assert ours("focal", labels=LABELS, link="sigmoid", gamma=gamma) == pytest.approx(expected, rel=1e-4)
    z, right = Z_S[:, :1], LABELS[:, None] % 2
    expected = sigmoid_focal_loss(z, right.float(), alpha=-1, gamma=gamma, reduction="mean").item()
    two = Signal(logits=torch.cat([torch.zeros_like(z), z], dim=1))
    loss, count = build_objective("focal", gamma=gamma)(two, None, right.squeeze(1))
    assert float(loss / count) == pytest.approx(expected, rel=1e-4)


@pytest.mark.parametrize("k", [1, 5, ANSWERS])
def test_top_k_against_a_loop(k):
    total = 0.0
    for p_s, p_t in zip(p(Z_S), p(Z_T), strict=True):
        best = np.argsort(-p_t)[:k]
        coarse_s, coarse_t = (np.append(q[best], q.sum() - q[best].sum()) for q in (p_s, p_t))
        total += sum(t * math.log(t / s) for s, t in zip(coarse_s, coarse_t, strict=True) if t > 1e-12)
    assert ours("top_k", k=k) == pytest.approx(total / B, rel=1e-5)


@pytest.mark.parametrize("temperature", TEMPERATURES)
@pytest.mark.parametrize(("alpha", "beta"), [(1.0, 8.0), (0.0, 1.0), (2.0, 0.0)])
def test_dkd_against_a_loop(temperature, alpha, beta):
    """As in the authors' code: batch means, T^2, and the right answer taken out before the second softmax."""
    right = wrong = 0.0
    for z_s, z_t, y in zip(Z_S.double().numpy(), Z_T.double().numpy(), LABELS.tolist(), strict=True):
        p_s, p_t = softmax(z_s / temperature), softmax(z_t / temperature)
        right += rel_entr([p_t[y], 1 - p_t[y]], [p_s[y], 1 - p_s[y]]).sum()
        others_s, others_t = softmax(np.delete(z_s, y) / temperature), softmax(np.delete(z_t, y) / temperature)
        wrong += rel_entr(others_t, others_s).sum()
    expected = temperature**2 * (alpha * right + beta * wrong) / B
    found = ours("dkd", labels=LABELS, alpha=alpha, beta=beta, temperature=temperature)
    assert found == pytest.approx(expected, rel=1e-4)


@pytest.mark.parametrize("top_k", [2, 6, 99])
def test_rankings_against_loops(top_k):
    pairwise = listnet = listmle = 0.0
    teacher = Z_T.clone()
    teacher[:, 7] = teacher[:, 3]  # ties make no pair
    for s, t in zip(Z_S.double().numpy(), teacher.double().numpy(), strict=True):
        best = sorted(range(ANSWERS), key=lambda i: -t[i])
        k = min(top_k, ANSWERS)
        pairs = [math.log1p(math.exp(s[j] - s[i])) for i in best[:k] for j in best[:k] if t[i] > t[j]]
        pairwise += sum(pairs) / max(len(pairs), 1)
        listnet += rel_entr(softmax(t[best[:k]]), softmax(s[best[:k]])).sum()
        for place in range(k):
            left = [math.exp(s[i]) for i in best[place:]]
            listmle -= math.log(math.exp(s[best[place]]) / sum(left)) / k
    for method, expected in (("pairwise", pairwise), ("listnet", listnet), ("listmle", listmle)):
        loss, _ = build_objective("ranking", method=method, top_k=top_k)(Signal(logits=Z_S), Signal(logits=teacher))
        assert loss.item() == pytest.approx(expected, rel=1e-4)


# ---- attention and relations, between models of one layout -----------------------------------------------------------

HEADS, N_TEXT, N_IMAGE, WIDTH = 4, 18, 21, 48
A_S = noise(3, B, HEADS, N_TEXT, N_IMAGE, scale=1.0).softmax(-1)
A_T = noise(4, B, HEADS, N_TEXT, N_IMAGE, scale=1.0).softmax(-1)


def attend(a_s: Tensor = A_S, a_t: Tensor = A_T, **settings) -> float:
    loss, count = build_objective("cross_attention", **settings)(Signal(text_to_image=a_s), Signal(text_to_image=a_t))
    return float(loss / count)


def test_cross_attention_against_scipy():
    s, t = (a.double().mean(1).numpy().reshape(-1, N_IMAGE) for a in (A_S, A_T))
    assert attend() == pytest.approx(rel_entr(t, s).sum(-1).mean(), rel=1e-4)
    assert attend(divergence="mse") == pytest.approx(((s - t) ** 2).sum(-1).mean(), rel=1e-4)
    by_row = [cosine(a, b) for a, b in zip(s, t, strict=True)]
    assert attend(divergence="cosine") == pytest.approx(np.mean(by_row), rel=1e-4)


def test_matched_heads_are_dides_loss_once_the_order_is_undone():
    """DiDE (Wang et al. 2022) compares head with head: so does `best`, when each head has one that is like it."""
    near = (0.9 * A_T + 0.1 * A_S)[:, [2, 0, 3, 1]]
    undone = near[:, [1, 3, 0, 2]].double().numpy()
    expected = rel_entr(A_T.double().numpy(), undone).sum(-1).mean()
    assert attend(near, heads="best") == pytest.approx(expected, rel=1e-4)
    assert attend(near) < expected  # averaging the heads first hides what they differ in


@pytest.mark.parametrize("heads", [1, 4, 12])
def test_relations_against_a_loop(heads):
    """MiniLM (Wang et al. 2020): eq. 5, the mean KL of attention rows, and eq. 6-7, the same of value relations."""
    parts = {
        name: (noise(5 + i, B, N_TEXT, WIDTH, scale=0.7), noise(8 + i, B, N_TEXT, WIDTH, scale=0.7))
        for i, name in enumerate("qkv")
    }

    def relation(a: Tensor, b: Tensor) -> NDArray[np.float64]:
        size = WIDTH // heads
        rows = []
        for x, y in zip(a.double().numpy(), b.double().numpy(), strict=True):
            for head in range(heads):
                cut = slice(head * size, (head + 1) * size)
                rows.append(softmax(x[:, cut] @ y[:, cut].T / math.sqrt(size), axis=-1))
        return np.concatenate(rows)

    expected = {
        "attention": (parts["q"], parts["k"]),
        "values": (parts["v"], parts["v"]),
        "queries": (parts["q"], parts["q"]),
    }
    for name, ((a_s, a_t), (b_s, b_t)) in expected.items():
        mean = rel_entr(relation(a_t, b_t), relation(a_s, b_s)).sum(-1).mean()
        objective = build_objective("value_relation", relations=name, relation_heads=heads)
        sides = [Signal(queries=parts["q"][i], keys=parts["k"][i], values=parts["v"][i]) for i in (0, 1)]
        loss, count = objective(*sides)
        assert float(loss / count) == pytest.approx(mean, rel=1e-4)
