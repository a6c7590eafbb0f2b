"""Text encoders from transformers: tiny models, saved with tokenizers that are trained here."""

from pathlib import Path

import pytest
import torch
from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers
from transformers import (
    BartConfig,
    BartModel,
    BertConfig,
    BertModel,
    CLIPConfig,
    CLIPModel,
    CLIPTextConfig,
    CLIPVisionConfig,
    DebertaV2Config,
    DebertaV2Model,
    PreTrainedModel,
    PreTrainedTokenizerFast,
    RobertaConfig,
    RobertaModel,
    SiglipConfig,
    SiglipModel,
    SiglipTextConfig,
    SiglipVisionConfig,
    T5Config,
    T5Model,
)

from cvlm.config import TextSpec
from cvlm.encoders import load_text_encoder
from cvlm.encoders.hf_text import HfText
from cvlm.errors import CvlmError

CORPUS = ["What colour is the triangle?", "Is there a  blue-green circle, or not?", "a café in Zürich: yes"] * 20
TEXTS = ["What colour is  the triangle?", "yes", "\tA café, is it?\n"]
SIZES = {"num_hidden_layers": 3, "num_attention_heads": 4, "intermediate_size": 56, "hidden_size": 40}


def wordpiece() -> PreTrainedTokenizerFast:
    backend = Tokenizer(models.WordPiece(unk_token="[UNK]"))
    backend.normalizer = normalizers.BertNormalizer()
    backend.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    special = ["[PAD]", "[UNK]", "[CLS]", "[SEP]"]
    backend.train_from_iterator(CORPUS, trainers.WordPieceTrainer(vocab_size=90, special_tokens=special))
    backend.post_processor = processors.TemplateProcessing(
        "[CLS] $A [SEP]", special_tokens=[("[CLS]", 2), ("[SEP]", 3)]
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=backend, pad_token="[PAD]", unk_token="[UNK]", cls_token="[CLS]", sep_token="[SEP]"
    )


def byte_level(pad: str | None = "<pad>") -> PreTrainedTokenizerFast:
    """Bytes with the white space inside the offsets, and a padding id of 1 as RoBERTa has it."""
    backend = Tokenizer(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=True, trim_offsets=False)
    backend.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=330,
        special_tokens=["<s>", "<pad>", "</s>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
    )
    backend.train_from_iterator(CORPUS, trainer)
    backend.post_processor = processors.TemplateProcessing("<s> $A </s>", special_tokens=[("<s>", 0), ("</s>", 2)])
    return PreTrainedTokenizerFast(tokenizer_object=backend, pad_token=pad, bos_token="<s>", eos_token="</s>")


def metaspace() -> PreTrainedTokenizerFast:
    """SentencePiece style, as DeBERTa-v2 and T5 have it."""
    backend = Tokenizer(models.Unigram())
    backend.pre_tokenizer = pre_tokenizers.Metaspace()
    trainer = trainers.UnigramTrainer(vocab_size=90, special_tokens=["<pad>", "</s>", "<unk>"], unk_token="<unk>")
    backend.train_from_iterator(CORPUS, trainer)
    backend.post_processor = processors.TemplateProcessing("$A </s>", special_tokens=[("</s>", 1)])
    return PreTrainedTokenizerFast(tokenizer_object=backend, pad_token="<pad>", eos_token="</s>", unk_token="<unk>")


def bert() -> PreTrainedModel:
    return BertModel(BertConfig(vocab_size=90, max_position_embeddings=24, **SIZES))


def roberta() -> PreTrainedModel:
    return RobertaModel(RobertaConfig(vocab_size=330, max_position_embeddings=26, pad_token_id=1, **SIZES))


def deberta() -> PreTrainedModel:
    return DebertaV2Model(
        DebertaV2Config(
            vocab_size=90,
            relative_attention=True,
            position_biased_input=False,
            pos_att_type=["p2c", "c2p"],
            norm_rel_ebd="layer_norm",
            **SIZES,
        )
    )


def t5() -> PreTrainedModel:
    return T5Model(T5Config(vocab_size=90, d_model=40, d_kv=8, num_heads=4, d_ff=56, num_layers=3))


def bart() -> PreTrainedModel:
    return BartModel(
        BartConfig(
            vocab_size=330,
            d_model=40,
            encoder_layers=3,
            decoder_layers=1,
            encoder_attention_heads=4,
            decoder_attention_heads=4,
            encoder_ffn_dim=56,
            max_position_embeddings=24,
            pad_token_id=1,
        )
    )


FAMILIES = {
    "bart": (bart, byte_level),
    "bert": (bert, wordpiece),
    "roberta": (roberta, byte_level),
    "deberta": (deberta, metaspace),
    "t5": (t5, metaspace),
}


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    torch.manual_seed(0)
    found = {}
    for family, (model, tokenizer) in FAMILIES.items():
        found[family] = tmp_path_factory.mktemp(family)
        model().save_pretrained(found[family])
        tokenizer().save_pretrained(found[family])
    return found


def load(folder: Path, **settings: object) -> HfText:
    settings = {"max_length": 24, **settings}
    encoder = load_text_encoder(TextSpec.model_validate({"name": f"hf:{folder}", **settings}))
    assert isinstance(encoder, HfText)
    return encoder


@pytest.mark.parametrize("family", FAMILIES)
class TestEveryFamily:
    def test_tokens_equal_the_plain_model(self, folders: dict[str, Path], family: str) -> None:
        encoder = load(folders[family])
        prepared = encoder.prepare(TEXTS)
        plain = FAMILIES[family][0]().from_pretrained(folders[family]).eval()
        plain = plain.get_encoder() if family in ("t5", "bart") else plain
        with torch.no_grad():
            expected = plain(input_ids=prepared["input_ids"], attention_mask=prepared["attention_mask"])
            output = encoder(**prepared)
        keep = output.mask
        torch.testing.assert_close(output.tokens[keep], expected.last_hidden_state[keep])
        assert encoder.width == 40
        assert output.tokens.shape == (3, prepared["input_ids"].shape[1], 40)
        torch.testing.assert_close(output.pooled[1], output.tokens[1][keep[1]].mean(dim=0))

    def test_spans_reproduce_the_text(self, folders: dict[str, Path], family: str) -> None:
        encoder = load(folders[family])
        for text in TEXTS:
            spans = encoder.prepare([text])["spans"][0].tolist()
            pieces = [text[start:end] for start, end in spans if end > start]
            assert pieces
            assert all(piece == piece.strip() for piece in pieces)
            covered = {place for start, end in spans for place in range(start, end)}
            assert covered == {place for place, character in enumerate(text) if not character.isspace()}

    def test_padding_changes_nothing(self, folders: dict[str, Path], family: str) -> None:
        encoder = load(folders[family])
        with torch.no_grad():
            together = encoder(**encoder.prepare(TEXTS))
            for row, text in enumerate(TEXTS):
                alone = encoder(**encoder.prepare([text]))
                length = alone.tokens.shape[1]
                torch.testing.assert_close(together.tokens[row, :length], alone.tokens[0], atol=1e-5, rtol=0)
                torch.testing.assert_close(together.pooled[row], alone.pooled[0], atol=1e-5, rtol=0)
                assert not together.mask[row, length:].any()
                assert not together.layout.words[row, length:].any()

    def test_layer_is_the_raw_output_of_that_block(self, folders: dict[str, Path], family: str) -> None:
        full, cut = load(folders[family]), load(folders[family], layer=1)
        prepared = full.prepare(TEXTS)
        mixed = full.model
        with torch.no_grad():
            hidden = mixed(
                input_ids=prepared["input_ids"], attention_mask=prepared["attention_mask"], output_hidden_states=True
            ).hidden_states
            tokens = cut(**prepared).tokens
        # hidden_states begins with the embeddings, so block 1 is entry 2.
        keep = prepared["attention_mask"].bool()
        torch.testing.assert_close(tokens[keep], hidden[2][keep])
        assert sum(p.numel() for p in cut.parameters()) < sum(p.numel() for p in full.parameters())
        torch.testing.assert_close(load(folders[family], layer=-2)(**prepared).tokens[keep], tokens[keep])

    def test_every_parameter_matters_and_has_one_layer(self, folders: dict[str, Path], family: str) -> None:
        encoder = load(folders[family], train="full")
        encoder(**encoder.prepare(TEXTS)).tokens.sum().backward()
        assert [name for name, item in encoder.named_parameters() if item.grad is None] == []
        layers = encoder.layers()
        assert len(layers) == 4
        assert sorted(name for layer in layers for name in layer) == sorted(dict(encoder.named_parameters()))

    def test_random_weights_have_the_same_names(self, folders: dict[str, Path], family: str) -> None:
        trained, fresh = load(folders[family]), load(folders[family], pretrained=False)
        assert list(trained.state_dict()) == list(fresh.state_dict())
        fresh.load_state_dict(trained.state_dict())
        prepared = trained.prepare(TEXTS)
        torch.testing.assert_close(trained(**prepared).tokens, fresh(**prepared).tokens)


def test_relative_positions_of_deberta_count_as_input(folders: dict[str, Path]) -> None:
    stem = load(folders["deberta"]).layers()[0]
    assert stem == [
        "model.embeddings.word_embeddings.weight",
        "model.embeddings.LayerNorm.weight",
        "model.embeddings.LayerNorm.bias",
        "model.encoder.rel_embeddings.weight",
        "model.encoder.LayerNorm.weight",
        "model.encoder.LayerNorm.bias",
    ]


def test_bert_loses_its_pooler_and_t5_keeps_its_norm_with_the_last_block(folders: dict[str, Path]) -> None:
    assert not [name for name, _ in load(folders["bert"]).named_parameters() if "pooler" in name]
    assert load(folders["t5"]).layers()[-1][-1] == "model.final_layer_norm.weight"


def test_long_texts_are_cut_and_keep_their_end_token(folders: dict[str, Path]) -> None:
    encoder = load(folders["bert"], max_length=6)
    prepared = encoder.prepare(["yes " * 30])
    assert prepared["input_ids"].shape == (1, 6)
    assert prepared["input_ids"][0, -1] == 3
    assert prepared["spans"][0, 0].tolist() == prepared["spans"][0, -1].tolist() == [0, 0]


@pytest.mark.parametrize(("family", "limit"), [("bert", 24), ("roberta", 24), ("bart", 24)])
def test_length_never_leaves_the_position_table(
    folders: dict[str, Path], family: str, limit: int, caplog: pytest.LogCaptureFixture
) -> None:
    encoder = load(folders[family], max_length=64)
    assert encoder.max_length == limit
    assert "max_length 64 is lowered" in caplog.text
    assert encoder(**encoder.prepare(["yes " * 80])).tokens.shape == (1, limit, 40)


def test_empty_text_keeps_its_special_tokens(folders: dict[str, Path]) -> None:
    encoder = load(folders["bert"])
    output = encoder(**encoder.prepare(["", "yes"]))
    assert output.mask[0].tolist()[:2] == [True, True]
    assert not output.layout.words[0].any()
    assert torch.isfinite(output.pooled).all()


def test_empty_text_without_special_tokens_keeps_one_position() -> None:
    tokenizer = wordpiece()
    tokenizer.backend_tokenizer.post_processor = processors.TemplateProcessing("$A", special_tokens=[])
    encoder = HfText(bert(), tokenizer, max_length=24)
    prepared = encoder.prepare([""])
    assert prepared["attention_mask"].tolist() == [[1]]
    assert torch.isfinite(encoder(**prepared).tokens).all()


def test_without_a_padding_token_the_end_token_pads() -> None:
    encoder = HfText(roberta(), byte_level(pad=None), max_length=24)
    assert encoder.prepare(["a", "a a a a"])["input_ids"][0, -1] == 2


def test_text_tower_of_a_clip_checkpoint(tmp_path: Path) -> None:
    sizes = {"num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 56}
    text = CLIPTextConfig(hidden_size=32, vocab_size=330, max_position_embeddings=20, eos_token_id=2, **sizes)
    vision = CLIPVisionConfig(hidden_size=48, image_size=32, patch_size=16, **sizes)
    whole = CLIPModel(CLIPConfig(text_config=text.to_dict(), vision_config=vision.to_dict())).eval()
    whole.save_pretrained(tmp_path)
    byte_level().save_pretrained(tmp_path)
    encoder = load(tmp_path, max_length=20)
    prepared = encoder.prepare(TEXTS)
    expected = whole.text_model(input_ids=prepared["input_ids"], attention_mask=prepared["attention_mask"])
    keep = prepared["attention_mask"].bool()
    torch.testing.assert_close(encoder(**prepared).tokens[keep], expected.last_hidden_state[keep])
    assert not [name for name, _ in encoder.named_parameters() if "vision" in name]


def test_text_tower_of_a_siglip_checkpoint(tmp_path: Path) -> None:
    text = SiglipTextConfig(vocab_size=330, max_position_embeddings=24, **SIZES)
    vision = SiglipVisionConfig(image_size=32, patch_size=16, **SIZES)
    whole = SiglipModel(SiglipConfig(text_config=text.to_dict(), vision_config=vision.to_dict())).eval()
    whole.save_pretrained(tmp_path)
    byte_level().save_pretrained(tmp_path)
    encoder = load(tmp_path)
    prepared = encoder.prepare(TEXTS)
    expected = whole.text_model(input_ids=prepared["input_ids"], attention_mask=prepared["attention_mask"])
    keep = prepared["attention_mask"].bool()
    torch.testing.assert_close(encoder(**prepared).tokens[keep], expected.last_hidden_state[keep])
    assert list(encoder.state_dict()) == list(load(tmp_path, pretrained=False).state_dict())


def test_a_slow_tokenizer_is_refused_by_name() -> None:
    class SlowTokenizer:
        is_fast = False
        name_or_path = "some/where"

    with pytest.raises(CvlmError, match=r"SlowTokenizer of 'some/where' is a slow tokenizer"):
        HfText(bert(), SlowTokenizer())


def test_missing_folder_and_missing_config_say_so(tmp_path: Path) -> None:
    with pytest.raises(CvlmError, match=r"there is no folder .*nowhere"):
        load(tmp_path / "nowhere")
    with pytest.raises(CvlmError, match=r"holds no config\.json"):
        load(tmp_path)


def test_folder_without_tokenizer_says_so(tmp_path: Path) -> None:
    bert().save_pretrained(tmp_path)
    with pytest.raises(CvlmError, match="holds no tokenizer vocabulary"):
        load(tmp_path)


def test_a_tokenizer_of_another_model_is_refused() -> None:
    small = BertModel(BertConfig(vocab_size=3, max_position_embeddings=24, pad_token_id=0, **SIZES))
    with pytest.raises(CvlmError, match=r"BertModel cannot encode .*check that the tokenizer belongs to the model"):
        HfText(small, wordpiece(), max_length=24)


def test_layer_out_of_range_says_the_range(folders: dict[str, Path]) -> None:
    with pytest.raises(CvlmError, match=r"layer is 3, but BertModel has 3 layers; use -3 to 2"):
        load(folders["bert"], layer=3)


def test_weights_of_another_architecture_are_refused(folders: dict[str, Path], tmp_path: Path) -> None:
    bert().save_pretrained(tmp_path)
    wordpiece().save_pretrained(tmp_path)
    deeper = {**SIZES, "num_hidden_layers": 4}
    BertConfig(vocab_size=90, max_position_embeddings=24, **deeper).save_pretrained(tmp_path)
    with pytest.raises(CvlmError, match=r"lacks \d+ weights of BertModel, for instance encoder\.layer\.3"):
        load(tmp_path)
