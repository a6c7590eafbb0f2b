"""Objectives on features and structure against torchdistill, and against loops over numbers where it has none.

Each test says by which factor the other definition differs. Ours is a sum over examples, so it is divided by the count.
"""

import math

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from distill.objectives import build_objective
from distill.objectives.boundary import FrozenProjection
from distill.signal import Signal

B, D_S, D_T, ANSWERS = 16, 24, 40, 19


@pytest.fixture
def losses():
    return pytest.importorskip("torchdistill.losses.mid_level")


def draw(seed: int, *shape: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def ours(objective, student: Signal, teacher: Signal, labels: Tensor | None = None) -> Tensor:
    loss, count = objective(student, teacher, labels)
    return loss / count


def assert_equal(found: Tensor, expected: Tensor, *leaves: Tensor) -> None:
    """Compare values and gradients."""
    torch.testing.assert_close(found, expected.to(found))
    for a, b in zip(torch.autograd.grad(found, leaves), torch.autograd.grad(expected, leaves), strict=True):
        torch.testing.assert_close(a, b)


def outputs(**tensors: Tensor) -> dict:
    return {name: {"output": tensor} for name, tensor in tensors.items()}


PATHS = {"student_output_path": "s", "teacher_output_path": "t"}
MODULES = {"student_module_path": "s", "student_module_io": "output", "teacher_module_path": "t"}
MODULES["teacher_module_io"] = "output"


def test_activation_boundary_is_a_thousandth_of_torchdistills(losses):
    s, t = (2 * draw(0, B, D_T)).requires_grad_(), draw(1, B, D_T)
    pair = {"student": {"io": "output", "path": "s"}, "teacher": {"io": "output", "path": "t"}}
    theirs = losses.AltActTransferLoss({"pair": pair}, margin=1.0, reduction="mean")(outputs(s=s), outputs(t=t))
    found = ours(build_objective("activation_boundary"), Signal(pooled=s), Signal(pooled=t))
    assert_equal(found, theirs / 1000, s)


@pytest.mark.parametrize("examples", [50, 7])
def test_activation_boundary_is_doktras_for_full_batches(examples):
    """DoKTra always divides by the nominal batch size, here 50, also where the last batch holds 7."""
    s, t, margin, nominal = draw(0, examples, D_S).double(), draw(1, examples, D_T).double(), 1.0, 50
    objective = build_objective("activation_boundary")
    student, teacher = Signal(pooled=s.float()), Signal(pooled=t.float())
    objective.prepare(student, teacher)
    (projection,) = objective.adapters
    assert isinstance(projection, FrozenProjection)
    t = t @ projection.weight.double().T + 0.01
    doktra = 0.0
    for i in range(examples):
        for d in range(D_S):
            if s[i, d] > -margin and t[i, d] <= 0:
                doktra += float((s[i, d] + margin) ** 2)
            if s[i, d] <= margin and t[i, d] > 0:
                doktra += float((s[i, d] - margin) ** 2)
    doktra /= 1000 * nominal
    assert float(ours(objective, student, teacher)) == pytest.approx(doktra * nominal / examples, rel=1e-5)


def test_pkt_is_torchdistills_times_the_batch(losses):
    """They average over all pairs; a divergence is summed over a row and averaged over rows."""
    s, t = draw(0, B, D_S).requires_grad_(), draw(1, B, D_T)
    theirs = losses.PKTLoss(**MODULES)(outputs(s=s), outputs(t=t))
    assert_equal(ours(build_objective("pkt"), Signal(pooled=s), Signal(pooled=t)), theirs * B, s)


@pytest.mark.parametrize(("distance", "angle"), [(25.0, 50.0), (1.0, 0.0), (0.0, 2.0)])
@pytest.mark.parametrize("examples", [B, 19, 3])
def test_relational_is_torchdistills(losses, distance, angle, examples):
    s, t = draw(0, examples, D_S).requires_grad_(), draw(1, examples, D_T)
    theirs = losses.RKDLoss(**PATHS, dist_factor=distance, angle_factor=angle, reduction="mean")
    objective = build_objective("relational", distance=distance, angle=angle)
    assert_equal(ours(objective, Signal(pooled=s), Signal(pooled=t)), theirs(outputs(s=s), outputs(t=t)), s)


def test_similarity_preserving_scales_rows_by_their_euclidean_length(losses):
    """Pair by pair in double precision, as in the paper. torchdistill scales rows by their sum of magnitudes."""
    s, t = draw(0, B, D_S).double().requires_grad_(), draw(1, B, D_T).double()

    def rows(states: Tensor, power: int) -> list[list[Tensor]]:
        products = [[one @ other for other in states] for one in states]
        sizes = [sum(abs(value) ** power for value in row) ** (1 / power) for row in products]
        return [[value / size for value in row] for row, size in zip(products, sizes, strict=True)]

    def expected(power: int) -> Tensor:
        g_s, g_t = rows(s, power), rows(t, power)
        return sum((g_s[i][j] - g_t[i][j]) ** 2 for i in range(B) for j in range(B)) / B**2

    objective = build_objective("similarity_preserving")
    assert_equal(ours(objective, Signal(pooled=s), Signal(pooled=t)), expected(2).float(), s)
    theirs = losses.SPKDLoss(**PATHS, reduction="batchmean")(outputs(s=s), outputs(t=t))
    torch.testing.assert_close(theirs, expected(1))


@pytest.mark.parametrize("kernel", ["gaussian", "bilinear"])
def test_correlation_is_torchdistills_squared_times_the_batch_squared(losses, kernel):
    """They take the norm `|K_s - K_t| / B^2` where the paper squares it, and leave scaling vectors to the caller."""
    s, t = draw(0, B, D_S).requires_grad_(), draw(1, B, D_T)
    config = {"type": kernel, "gamma": 0.3, "max_p": 3}
    loss = losses.CCKDLoss("s", "t", config, reduction="batchmean")
    theirs = loss(outputs(s=F.normalize(s, dim=1)), outputs(t=F.normalize(t, dim=1)))
    objective = build_objective("correlation", kernel=kernel, gamma=0.3, order=3)
    assert_equal(ours(objective, Signal(pooled=s), Signal(pooled=t)), theirs**2 * B**2, s)


@pytest.mark.parametrize("settings", [{}, {"inter": 2.0, "intra": 0.5, "temperature": 3.0}])
def test_dist_is_torchdistills(losses, settings):
    s, t = draw(0, B, ANSWERS).requires_grad_(), draw(1, B, ANSWERS)
    names = {"inter": "beta", "intra": "gamma", "temperature": "tau"}
    theirs = losses.DISTLoss(**MODULES, **{names[key]: value for key, value in settings.items()})
    found = ours(build_objective("dist", **settings), Signal(logits=s), Signal(logits=t))
    assert_equal(found, theirs(outputs(s=s), outputs(t=t)), s)


def test_vid_is_torchdistills(losses):
    s, t = draw(0, B, D_S).requires_grad_(), draw(1, B, D_T)
    objective = build_objective("vid")
    objective.prepare(Signal(pooled=s), Signal(pooled=t))
    (gaussian,) = objective.adapters
    with torch.no_grad():
        gaussian.raw_variance.add_(draw(2, D_T))
    variance = torch.log1p(gaussian.raw_variance.exp()) + 1e-5
    pair = {"student": {"io": "output", "path": "s"}, "teacher": {"io": "output", "path": "t"}}
    student = {"s": {"output": (gaussian.mean(s), variance.expand(B, D_T))}}
    theirs = losses.VIDLoss({"pair": pair})(student, outputs(t=t))
    assert_equal(ours(objective, Signal(pooled=s), Signal(pooled=t)), theirs, s, *gaussian.parameters())


def test_crd_is_torchdistills_where_its_memory_holds_the_same_vectors(losses):
    """Theirs draws negatives from a bank by index; here it is given the batch and the queue as the bank's rows.

    A positive is a row of the bank there: here the batch's own vectors are put into it. `eps` is theirs alone.
    """
    examples, queue, width = 16, 48, 20  # a bank of 64 rows: theirs can only draw from a power of two
    s, t = draw(0, examples, D_S).requires_grad_(), draw(1, examples, D_T)
    objective = build_objective("crd", dimensions=width, queue=queue, temperature=0.2)
    student, teacher = Signal(pooled=s), Signal(pooled=t)
    objective.prepare(student, teacher)
    bank = F.normalize(draw(2, 2, queue, width), dim=-1)
    objective.vectors_kept.copy_(bank)
    embedded = [F.normalize(part(x), dim=1) for part, x in zip(objective.maps, (s, t), strict=True)]

    theirs = losses.CRDLoss(
        "s", "empty", "t", width, examples + queue, examples + queue - 1, examples + queue, temperature=0.2, eps=0.0
    )
    theirs.memory_v1.copy_(torch.cat([embedded[0].detach(), bank[0]]))
    theirs.memory_v2.copy_(torch.cat([embedded[1].detach(), bank[1]]))
    rows = torch.arange(examples + queue)
    order = torch.stack([torch.cat([rows[i : i + 1], rows[:i], rows[i + 1 :]]) for i in range(examples)])
    given = {"pos_idx": rows[:examples], "contrast_idx": order}
    expected = theirs({"s": {"output": embedded[0]}, "empty": {"input": given}}, {"t": {"output": embedded[1]}})
    assert_equal(ours(objective, student, teacher), expected.squeeze(), s, *objective.maps.parameters())
    assert objective.partition[0].item() == pytest.approx(theirs.params[2].item() / (examples + queue))


@pytest.mark.parametrize("explore", ["distance", "cosine"])
def test_internal_external_is_factor_transfer_of_both_halves(losses, explore):
    """torchdistill has the factor-transfer distance; exploring by cosine is written out."""
    s, t = draw(0, B, D_S).requires_grad_(), draw(1, B, D_T)
    objective = build_objective("internal_external", explore=explore, inheritance=0.7, exploration=0.2)
    objective.prepare(Signal(pooled=s), Signal(pooled=t))
    (halves,) = objective.adapters
    inherited, explored = halves.inherited(s[:, : D_S // 2]), halves.explored(s[:, D_S // 2 :])
    distance = losses.FTLoss(p=1, reduction="mean", paraphraser_path="t", translator_path="s")
    near, far = (distance(outputs(s=part), outputs(t=t)) for part in (inherited, explored))
    if explore == "cosine":
        cosines = [(e @ f / (e.norm() * f.norm())).abs() for e, f in zip(explored, t, strict=True)]
        expected = 0.7 * near + 0.2 * torch.stack(cosines).mean()
    else:
        expected = 0.7 * near - 0.2 * far
    assert_equal(ours(objective, Signal(pooled=s), Signal(pooled=t)), expected, s, *objective.parameters())


def log_softmax(row: list[float]) -> list[float]:
    total = math.log(sum(math.exp(z) for z in row))
    return [z - total for z in row]


def divergence(p: list[float], q: list[float]) -> float:
    """KL of two rows of logits."""
    return sum(math.exp(a) * (a - b) for a, b in zip(log_softmax(p), log_softmax(q), strict=True))


def test_contrastive_is_clip_kds():
    """From scratch, in double precision: CLIP-KD's own code cannot run on one process."""
    image, text, image_t, text_t = (F.normalize(draw(i, B, D_S).double(), dim=1) for i in range(4))
    sim, sim_t = (5 * draw(i, B, B).double() for i in (4, 5))
    labels = torch.arange(B)
    labels[5], labels[3:5] = 2, -100  # pictures 2 and 5 are one group; two have no label
    feature = sum(
        float(((a[i] - b[i]) ** 2).sum()) / D_S for a, b in ((image, image_t), (text, text_t)) for i in range(B)
    )
    interactive = 0.0
    for anchors, others in ((image, text_t), (text, image_t)):
        for i in range(B):
            logs = log_softmax([float(anchors[i] @ other) / 0.07 for other in others])
            same = [2, 5] if i in (2, 5) else [i]
            interactive -= sum(logs[j] for j in same) / len(same) / 2
    rows = sum(divergence(a, b) for a, b in zip(sim_t.tolist(), sim.tolist(), strict=True))
    columns = sum(divergence(a, b) for a, b in zip(sim_t.T.tolist(), sim.T.tolist(), strict=True))

    def signal(*fields: Tensor) -> Signal:
        names = ("image_embedding", "text_embedding", "similarity")
        return Signal(**dict(zip(names, (field.float() for field in fields), strict=True)))

    student, teacher = signal(image, text, sim), signal(image_t, text_t, sim_t)
    expected = {"feature": 2000 * feature, "interactive": interactive, "similarity": (rows + columns) / 2}
    for part, value in [*expected.items(), ("all", sum(expected.values()))]:
        found = ours(build_objective("contrastive", parts=part), student, teacher, labels)
        assert float(found) == pytest.approx(value / B, rel=1e-5), part


def test_mutual_is_torchdistills_distillation_at_temperature_one(losses):
    s, t = draw(0, B, ANSWERS).requires_grad_(), draw(1, B, ANSWERS)
    kd = losses.KDLoss("s", "output", "t", "output", temperature=1.0, alpha=0.0)
    assert_equal(ours(build_objective("mutual"), Signal(logits=s), Signal(logits=t)), kd(outputs(s=s), outputs(t=t)), s)


def test_continual_is_a_divergence_over_the_old_answers():
    """In double precision; avalanche's value too, which has no factor T^2 either."""
    s, t, columns = draw(0, B, 7), draw(1, B, 4), [5, 0, 2, 6]
    found = ours(build_objective("continual", answers=columns), Signal(logits=s), Signal(logits=t))
    old = (t / 2).double().tolist()
    new = (s[:, columns] / 2).double().tolist()
    assert float(found) == pytest.approx(sum(map(divergence, old, new)) / B, rel=1e-5)


def test_heterogeneous_adds_probabilities_up():
    """In double precision: answers 0 and 3 are class 2, answer 1 is class 0, answer 2 has none; nothing is class 1."""
    s, t, temperature = 3 * draw(0, B, 4), 3 * draw(1, B, 3), 2.5
    objective = build_objective("heterogeneous", mapping=[2, 0, None, 2], temperature=temperature)
    expected = 0.0
    for z, y in zip(s.double().tolist(), t.double().tolist(), strict=True):
        weights = [math.exp(value / temperature) for value in z]
        kept = weights[0] + weights[1] + weights[3]
        classes = [math.log(weights[1] / kept), math.log((weights[0] + weights[3]) / kept)]
        expected += temperature**2 * divergence([y[0] / temperature, y[2] / temperature], classes)
    assert float(ours(objective, Signal(logits=s), Signal(logits=t))) == pytest.approx(expected / B, rel=1e-5)


@pytest.mark.parametrize("distance", ["mse", "cosine", "normalised"])
def test_hidden_distances_are_what_torch_computes(distance):
    s, t = draw(0, B, D_S).requires_grad_(), draw(1, B, D_T)
    objective = build_objective("hidden", states="pooled", distance=distance)
    objective.prepare(Signal(pooled=s), Signal(pooled=t))
    regressed = objective.adapters[0](s)
    expected = {
        "mse": F.mse_loss(regressed, t),
        "cosine": F.cosine_embedding_loss(regressed, t, torch.ones(B)),
        "normalised": F.mse_loss(regressed / regressed.norm(dim=1, keepdim=True), t / t.norm(dim=1, keepdim=True)),
    }[distance]
    assert_equal(ours(objective, Signal(pooled=s), Signal(pooled=t)), expected, s, *objective.parameters())
