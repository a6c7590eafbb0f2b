"""The captioner: no word sees a later one, what is generated is what was learned, and a saved model says the same."""

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from cvlm.config import StudentSpec
from cvlm.data import CaptionWords
from cvlm.errors import CvlmError
from cvlm.model import CVLM, compose, load_model
from cvlm.model.decoder import PADDING, Step, beam_search
from cvlm.tasks import END, LONGEST_CAPTION, SPECIAL_WORDS, START, UNKNOWN
from distill import Request

WORDS = (*SPECIAL_WORDS, "a", "red", "green", "blue", "picture", "of", "nothing")
CAPTIONS = ("A red picture", "nothing", "a picture of a blue picture")
Make = Callable[..., StudentSpec]


def captioner(make: Make, **fusion: object) -> CVLM:
    torch.manual_seed(0)
    model = compose(make("cross", **fusion), task="captioning", answers=WORDS).eval()
    assert model.decoder is not None
    with torch.no_grad():
        model.decoder.bias.normal_()  # captions that differ from picture to picture, and end
        model.decoder.positions.mul_(30)
        model.decoder.own.normal_()
    return model


@pytest.fixture
def pictures(paint: Callable[..., Any]) -> list[Any]:
    return [
        paint(f"{i}", colour, seed=i).load() for i, colour in enumerate([(220, 30, 30), (30, 180, 40), (40, 60, 220)])
    ]


def inputs(model: Any, pictures: list[Any]) -> tuple[Any, dict[str, Tensor]]:
    words = CaptionWords.of(CAPTIONS, WORDS)
    return model.vision.prepare(pictures), words.inputs(torch.arange(3).numpy())


def test_what_is_promised_is_given(tiny_spec: Make, pictures: list[Any]) -> None:
    model = captioner(tiny_spec)
    layers = frozenset({0, 1})
    request = Request(fields=model.fields, attention_layers=layers, hidden_layers=layers)
    signal = model(*inputs(model, pictures), request=request)
    assert signal.fields == model.fields
    assert signal.word_logits.shape == (3, 7, len(WORDS))
    assert signal.text_to_image[1].shape == (3, 4, 7, 17)
    torch.testing.assert_close(signal.text_to_image[1].sum(-1), torch.ones(3, 4, 7))
    assert signal.hidden[0].shape == (3, 7, 32)
    # A place belongs to the word that is predicted there; the sign for the end belongs to none.
    assert signal.text_layout.spans[0].tolist() == [[0, 1], [2, 5], [6, 13], [0, 0], [0, 0], [0, 0], [0, 0]]


def test_a_word_shows_only_behind_it(tiny_spec: Make, pictures: list[Any]) -> None:
    model = captioner(tiny_spec)
    image, text = inputs(model, pictures)
    before = model(image, text).word_logits
    changed = text["words"].clone()
    changed[2, 3] = WORDS.index("green")
    after = model(image, text | {"words": changed}).word_logits
    torch.testing.assert_close(after[2, :4], before[2, :4], rtol=0, atol=1e-6)
    assert (after[2, 4:] - before[2, 4:]).abs().amax(-1).min() > 1e-3


def test_padding_does_not_matter(tiny_spec: Make, pictures: list[Any]) -> None:
    model = captioner(tiny_spec)
    image, text = inputs(model, pictures)
    together = model(image, text).word_logits
    alone = CaptionWords.of(CAPTIONS[:1], WORDS).inputs(torch.arange(1).numpy())
    apart = model(model.vision.prepare(pictures[:1]), alone).word_logits  # type: ignore[operator]
    torch.testing.assert_close(apart[0], together[0, :4], rtol=1e-4, atol=1e-5)


def test_the_picture_matters(tiny_spec: Make, pictures: list[Any]) -> None:
    model = captioner(tiny_spec)
    image, text = inputs(model, pictures)
    other = model.vision.prepare(pictures[::-1])  # type: ignore[operator]
    assert (model(image, text).word_logits[0] - model(other, text).word_logits[0]).abs().max() > 1e-3


def test_every_tensor_gets_a_gradient(tiny_spec: Make, pictures: list[Any]) -> None:
    model = captioner(tiny_spec)
    model(*inputs(model, pictures)).word_logits.square().mean().backward()
    trained = {name for name, tensor in model.named_parameters() if tensor.requires_grad}
    assert trained == {name for name, tensor in model.named_parameters() if tensor.grad is not None}
    assert {name.split(".")[0] for name in trained} == {"fusion", "decoder"}


def test_greedy_captions_are_the_likeliest_words_behind_themselves(tiny_spec: Make, pictures: list[Any]) -> None:
    model = captioner(tiny_spec)
    assert model.decoder is not None
    image = model.vision.prepare(pictures)  # type: ignore[operator]
    found = model.decoder.generate(model.fusion, model.project_images(image), beam=1, longest=12)
    spans = torch.zeros(*found.shape, 2, dtype=torch.long)
    logits = model(image, {"words": found, "spans": spans}).word_logits.clone()
    logits[..., [UNKNOWN, START]] = -torch.inf
    logits[:, 0, END] = -torch.inf
    written = found != PADDING
    assert torch.equal(logits.argmax(-1)[written], found[written])
    assert written[:, 0].all()


def test_captions_that_have_ended_wait_for_the_others(tiny_spec: Make, pictures: list[Any]) -> None:
    model = captioner(tiny_spec)
    assert model.decoder is not None
    with torch.no_grad():
        model.decoder.bias[END] = 4  # a beam in which some caption ends at once and others go on
    image = model.project_images(model.vision.prepare(pictures))  # type: ignore[operator]
    together = model.decoder.generate(model.fusion, image, beam=3, longest=8)
    for row, picture in enumerate(pictures):
        alone = model.project_images(model.vision.prepare([picture]))  # type: ignore[operator]
        found = model.decoder.generate(model.fusion, alone, beam=3, longest=8)
        assert torch.equal(found[0], together[row])


def test_captions_are_words(tiny_spec: Make, pictures: list[Any]) -> None:
    model = captioner(tiny_spec)
    said = model.describe(model.vision.prepare(pictures))  # type: ignore[operator]
    assert len(said) == 3
    assert all(words and set(words.split()) <= set(WORDS[3:]) for words in said)
    projected = model.project_images(model.vision.prepare(pictures))  # type: ignore[operator]
    assert model.describe(projected) == said


def test_a_saved_captioner_says_the_same(tiny_spec: Make, pictures: list[Any], tmp_path: Any) -> None:
    # The tiny towers have random weights, so they stand in the file; the text tower is not run again.
    model = captioner(tiny_spec)
    model.save_pretrained(tmp_path / "model")
    again = load_model(tmp_path / "model")
    assert model.decoder is not None
    assert again.decoder is not None
    assert torch.equal(again.decoder.features, model.decoder.features)
    with torch.no_grad():
        one, other = (m(*inputs(m, pictures)).word_logits for m in (model, again))
    torch.testing.assert_close(other, one, rtol=0, atol=0)


def test_the_text_encoder_reads_each_word(tiny_spec: Make) -> None:
    model = captioner(tiny_spec)
    assert model.decoder is not None
    for word in ("red", "picture"):
        alone = model.text(**model.text.prepare([word])).pooled[0]  # type: ignore[operator]
        torch.testing.assert_close(model.decoder.features[WORDS.index(word)], alone, rtol=1e-4, atol=1e-5)


class TestRefused:
    @pytest.mark.parametrize("kind", ["co_attention", "merged", "none"])
    def test_fusion_that_would_show_later_words(self, tiny_spec: Make, kind: str) -> None:
        with pytest.raises(CvlmError, match=f"'captioning' needs fusion kind cross, got '{kind}'"):
            compose(tiny_spec(kind), task="captioning", answers=WORDS)

    def test_a_trained_text_encoder(self, tiny_spec: Make) -> None:
        with pytest.raises(CvlmError, match="lets the text encoder read each word once; set its train to frozen"):
            compose(tiny_spec("cross", text={"train": "full"}), task="captioning", answers=WORDS)

    @pytest.mark.parametrize("words", [(), ("a", "b", "c", "d"), SPECIAL_WORDS])
    def test_a_vocabulary_without_its_special_words(self, tiny_spec: Make, words: tuple[str, ...]) -> None:
        with pytest.raises(CvlmError, match="begins with <unk>, <start>, <end> and goes on with at least one word"):
            compose(tiny_spec("cross"), task="captioning", answers=words)

    def test_whole_texts(self, tiny_spec: Make, pictures: list[Any]) -> None:
        model = captioner(tiny_spec)
        with pytest.raises(CvlmError, match="a captioner reads the words of captions"):
            model(model.vision.prepare(pictures), model.text.prepare(CAPTIONS))  # type: ignore[operator]


def chain(moves: dict[tuple[int, ...], dict[int, float]], words: int = 6) -> Step:
    """A model given by probabilities of the next word behind each prefix (without the start); unlisted ones are 0."""

    def step(prefix: Tensor, picture: Tensor) -> Tensor:
        assert len(prefix) == len(picture)
        assert not torch.isin(prefix, torch.tensor([END, PADDING])).any(), "captions that have ended cost nothing more"
        rows = torch.full((len(prefix), words), -math.inf)
        for row, seen in zip(rows, prefix[:, 1:].tolist(), strict=True):
            for word, chance in moves.get(tuple(seen), {END: 1.0}).items():
                row[word] = math.log(chance)
        return rows

    return step


# Greedy begins with 3 (0.6) and ends at a mean of log(0.6 * 0.3) / 2; behind 4 (0.4) the end is certain.
MOVES = {(): {3: 0.6, 4: 0.4}, (3,): {END: 0.3, 4: 0.25, 5: 0.25}, (4,): {END: 1.0}}


class TestSearch:
    def test_greedy_and_beam_by_hand(self) -> None:
        device = torch.device("cpu")
        greedy = beam_search(chain(MOVES), 2, beam=1, longest=5, device=device)
        assert greedy.tolist() == [[3, END, PADDING, PADDING, PADDING]] * 2
        wide = beam_search(chain(MOVES), 2, beam=3, longest=5, device=device)
        # 4 END has log(0.4) / 2 = -0.46; 3 4 END has log(0.6 * 0.25) / 3 = -0.63; 3 END -0.86.
        assert wide.tolist() == [[4, END, PADDING, PADDING, PADDING]] * 2

    def test_length_is_no_fault(self) -> None:
        # log(0.5) / 2 = -0.35 for the short one, log(0.5 * 0.9 * 0.9) / 4 = -0.23 for the long one.
        moves = {(): {3: 0.5, 4: 0.5}, (4,): {5: 0.9, END: 0.1}, (4, 5): {5: 0.9, END: 0.1}}
        found = beam_search(chain(moves), 1, beam=3, longest=6, device=torch.device("cpu"))
        assert found.tolist() == [[4, 5, 5, END, PADDING, PADDING]]

    def test_unknown_start_and_nothing_are_never_said(self) -> None:
        moves = {(): {END: 0.7, UNKNOWN: 0.2, 3: 0.1}, (3,): {START: 0.6, UNKNOWN: 0.3, END: 0.1}}
        for beam in (1, 3):
            found = beam_search(chain(moves), 1, beam=beam, longest=3, device=torch.device("cpu"))
            assert found.tolist() == [[3, END, PADDING]]

    def test_endless_captions_are_cut(self) -> None:
        moves = {(3,) * n: {3: 1.0} for n in range(9)}
        found = beam_search(chain(moves), 1, beam=2, longest=4, device=torch.device("cpu"))
        assert found.tolist() == [[3, 3, 3, 3]]


def test_long_captions_are_cut_without_an_end() -> None:
    words = CaptionWords.of(["a " * (LONGEST_CAPTION + 5), "a red thing"], WORDS)
    assert (words[0] == WORDS.index("a")).all()
    assert len(words[0]) == LONGEST_CAPTION
    assert words[1].tolist() == [WORDS.index("a"), WORDS.index("red"), UNKNOWN, END]
