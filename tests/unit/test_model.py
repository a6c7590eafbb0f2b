"""The model: every fusion kind and task runs, gives what it promises, and learns in every part."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from cvlm.config import StudentSpec
from cvlm.data import Examples
from cvlm.errors import CvlmError
from cvlm.model import CVLM, compose, take
from cvlm.model.heads import EmbeddingHead, hard_negatives, masked_mean
from distill import Request, build_objective
from fusion import BLOCKS

ANSWERS = ("red", "green", "blue")
KINDS = sorted(BLOCKS)
TASKS = ("vqa", "retrieval")
Make = Callable[..., StudentSpec]


def build(spec: StudentSpec, task: str) -> CVLM:
    torch.manual_seed(0)
    return compose(spec, task=task, answers=ANSWERS if task == "vqa" else ()).eval()


@pytest.fixture
def batch(colour_vqa: Callable[..., Examples]) -> tuple[list[Any], list[str], Tensor]:
    data = colour_vqa(5)
    pictures = [data.pictures[i].load() for i in data.image_of]
    return pictures, [data.texts[i] for i in data.text_of], torch.from_numpy(data.labels)


def prepared(model: Any, batch: tuple[list[Any], list[str], Tensor]) -> tuple[Any, Any]:
    return model.vision.prepare(batch[0]), model.text.prepare(batch[1])


def everything(model: CVLM) -> Request:
    layers = frozenset(range(model.fusion.depth))
    return Request(fields=model.fields, attention_layers=layers, hidden_layers=layers, projection_layers=layers)


@pytest.mark.parametrize("task", TASKS)
@pytest.mark.parametrize("kind", KINDS)
class TestEveryKindAndTask:
    def test_what_is_promised_is_given(self, tiny_spec: Make, batch: Any, kind: str, task: str) -> None:
        model = build(tiny_spec(kind), task)
        signal = model(*prepared(model, batch), request=everything(model))
        assert signal.fields == model.fields
        n_text, n_image = signal.text_layout.spans.shape[1], signal.image_layout.tokens
        assert n_image == 17
        if task == "vqa":
            assert signal.logits.shape == (5, 3)
            assert signal.pooled.shape == (5, 64)
            for layer in range(model.fusion.depth):
                maps = signal.text_to_image[layer]
                assert maps.shape == (5, 4, n_text, n_image)
                torch.testing.assert_close(maps.sum(-1)[:, :, 0], torch.ones(5, 4))
                assert signal.hidden[layer].shape == (5, n_text, 32)
        else:
            assert signal.similarity.shape == (5, 5)
            assert (signal.matching is None) == (kind == "none")
            assert signal.matching is None or signal.matching.shape == (3, 5)
        values = [value for value in vars(signal).values() if isinstance(value, Tensor)]
        assert all(torch.isfinite(value).all() for value in values)

    def test_every_trainable_parameter_learns_from_labels(
        self, tiny_spec: Make, batch: Any, kind: str, task: str
    ) -> None:
        full = {"train": "full"}
        model = build(tiny_spec(kind, vision=full, text=full), task).train()
        objective = build_objective("labels")
        request = objective.requests(model.fusion.depth, 0)[0]
        labels = batch[2] if task == "vqa" else torch.arange(5)
        signal = model(*prepared(model, batch), request=request, labels=labels)
        objective(signal, None, labels)[0].backward()
        without = [name for name, item in model.named_parameters() if item.grad is None]
        assert without == []
        zero = [name for name, item in model.named_parameters() if not item.grad.any()]  # type: ignore[union-attr]
        assert zero == []

    def test_padding_changes_nothing(self, tiny_spec: Make, batch: Any, kind: str, task: str) -> None:
        model = build(tiny_spec(kind), task)
        image, text = prepared(model, batch)
        longer = {
            name: torch.cat([value, torch.zeros_like(value[:, :1]).expand(-1, 4, *value.shape[2:])], dim=1)
            for name, value in text.items()
        }
        name = "logits" if task == "vqa" else "similarity"
        with torch.no_grad():
            plain, padded = (getattr(model(image, given), name) for given in (text, longer))
        torch.testing.assert_close(plain, padded, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("kind", [kind for kind in KINDS if kind != "none"])
def test_only_requested_layers_are_recorded(tiny_spec: Make, batch: Any, kind: str) -> None:
    model = build(tiny_spec(kind, depth=3), "vqa")
    inputs = prepared(model, batch)
    plain = model(*inputs)
    assert plain.fields == {"logits", "text_layout", "image_layout"}
    request = Request(
        fields=frozenset({"logits", "values"}),
        attention_layers=frozenset({1}),
        hidden_layers=frozenset({2}),
        projection_layers=frozenset({0}),
    )
    one = model(*inputs, request=request)
    assert set(one.text_to_image) == {1}
    assert set(one.hidden) == {2}
    assert set(one.values) == {0}
    assert one.queries is one.keys is None
    assert (one.image_to_text is not None) == (kind != "cross")
    assert one.pooled is None
    torch.testing.assert_close(one.logits, plain.logits, atol=1e-5, rtol=1e-5)
    with pytest.raises(ValueError, match=r"fusion has layers 0\.\.2; asked for \[3\]"):
        model(*inputs, request=Request(attention_layers=frozenset({3})))


def test_stored_outputs_pass_through(tiny_spec: Make, batch: Any) -> None:
    model = build(tiny_spec(), "vqa")
    image, text = prepared(model, batch)
    with torch.no_grad():
        encoded = model.encode_image(image), model.encode_text(text)
        torch.testing.assert_close(model(*encoded).logits, model(image, text).logits)
    order = torch.tensor([3, 3, 0])
    taken = take(encoded[1], order)
    assert torch.equal(taken.tokens, encoded[1].tokens[order])
    assert torch.equal(taken.layout.spans, text["spans"][order])  # type: ignore[union-attr]
    assert taken.pooled.shape == (3, 40)


class TestRetrieval:
    def test_embeddings_are_unit_vectors_and_give_the_similarity(self, tiny_spec: Make, batch: Any) -> None:
        model = build(tiny_spec("cross"), "retrieval")
        image, text = prepared(model, batch)
        with torch.no_grad():
            images, texts = model.embed_images(image), model.embed_texts(text)
            similarity = model(image, text).similarity
        assert images.shape == texts.shape == (5, 24)
        torch.testing.assert_close(images.norm(dim=-1), torch.ones(5))
        torch.testing.assert_close(texts.norm(dim=-1), torch.ones(5))
        assert model.embedding_head is not None
        torch.testing.assert_close(similarity, images @ texts.T / 0.07, atol=1e-4, rtol=1e-4)

    def test_the_scale_stays_below_a_hundred(self) -> None:
        head = EmbeddingHead(16, 24)
        torch.testing.assert_close(head.scale, torch.tensor(1 / 0.07))
        nn.init.constant_(head.log_scale, 9.0)
        assert head.scale.item() == pytest.approx(100)

    def test_match_is_row_one_of_matching(self, tiny_spec: Make, batch: Any) -> None:
        model = build(tiny_spec("co_attention"), "retrieval")
        image, text = prepared(model, batch)
        with torch.no_grad():
            signal = model(image, text, request=Request(fields=frozenset({"matching"})))
            torch.testing.assert_close(signal.matching[0], model.match(image, text), atol=1e-5, rtol=1e-5)

    def test_matching_costs_nothing_unless_asked_for(
        self, tiny_spec: Make, batch: Any, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        model = build(tiny_spec("co_attention"), "retrieval")
        monkeypatch.setattr(CVLM, "match", lambda *_: pytest.fail("matching was run"))
        assert model(*prepared(model, batch), request=Request(fields=frozenset({"similarity"}))).matching is None


class TestHardNegatives:
    def test_never_of_the_same_group(self) -> None:
        torch.manual_seed(0)
        group = torch.tensor([0, 1, 0, 2, 2, 3])
        similarity = 50.0 * (group[:, None] == group[None, :]).float() + torch.randn(6, 6)
        for _ in range(200):
            text, image = hard_negatives(similarity, group)
            assert (group[text] != group).all()
            assert (group[image] != group).all()

    def test_the_more_similar_the_more_often(self) -> None:
        torch.manual_seed(0)
        similarity = torch.zeros(4, 4)
        similarity[0, 2] = similarity[3, 1] = 6.0
        draws = [hard_negatives(similarity, torch.arange(4)) for _ in range(300)]
        assert sum(int(text[0]) == 2 for text, _ in draws) > 285
        # The second result reads columns: text 1 is most like image 3.
        assert sum(int(image[1]) == 3 for _, image in draws) > 285
        assert sum(int(text[1]) == 3 for text, _ in draws) < 200

    def test_one_group_alone_still_draws(self) -> None:
        text, image = hard_negatives(torch.randn(5, 5), torch.zeros(5, dtype=torch.long))
        assert text.shape == image.shape == (5,)

    def test_extreme_scores(self) -> None:
        text, _ = hard_negatives(torch.eye(4).half() * 6e4, torch.arange(4))
        assert (text != torch.arange(4)).all()


def test_masked_mean_by_hand() -> None:
    tokens = torch.arange(24.0).view(2, 3, 4)
    keep = torch.tensor([[True, False, True], [False, False, False]])
    assert masked_mean(tokens, keep).tolist() == [[4.0, 5.0, 6.0, 7.0], [0.0] * 4]


class Plain(nn.Module):
    """An encoder of a user: knows nothing of this package but the protocol."""

    def __init__(self) -> None:
        super().__init__()
        self.norm = nn.BatchNorm1d(8)


def test_frozen_encoders_stay_in_eval(tiny_spec: Make) -> None:
    model = build(tiny_spec(text={"train": "last_1"}), "vqa")
    frozen = Plain().requires_grad_(False)
    model.vision.extra = frozen
    model.train()
    assert not model.vision.training
    assert not frozen.norm.training
    assert model.text.training
    assert model.fusion.training
    assert not model.eval().text.training


class TestMistakes:
    def test_an_unknown_task(self, tiny_spec: Make) -> None:
        with pytest.raises(CvlmError, match=r"unknown task 'vqaa' \(did you mean 'vqa'\?\)"):
            build(tiny_spec(), "vqaa")

    @pytest.mark.parametrize(
        ("answers", "message"),
        [
            ((), "needs an answer vocabulary of at least 2 answers, got 0"),
            (("yes",), "at least 2 answers, got 1"),
            (("yes", "no", "yes"), "the answer vocabulary repeats 'yes'"),
        ],
    )
    def test_answers(self, tiny_spec: Make, answers: tuple[str, ...], message: str) -> None:
        with pytest.raises(CvlmError, match=message):
            compose(tiny_spec(), task="vqa", answers=answers)

    def test_an_encoder_without_the_protocol(self, tiny_spec: Make) -> None:
        with pytest.raises(CvlmError, match=r"text encoder Plain lacks width, prepare, layers; see cvlm\.Encoder"):
            compose(tiny_spec(), task="vqa", answers=ANSWERS, text=Plain())
