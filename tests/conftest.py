"""Parts that many tests share: tiny encoders on disk, small pictures, small data. Nothing here needs a network."""

from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers
from transformers import BertConfig, BertModel, PreTrainedTokenizerFast, RobertaConfig, RobertaModel

from cvlm.config import FusionSpec, StudentSpec, TextSpec, VisionSpec
from cvlm.data import Examples, PictureFile, index_texts

COLOURS = {"red": (220, 30, 30), "green": (30, 180, 40), "blue": (40, 60, 220)}
QUESTIONS = ("which colour is it?", "what is the colour of this whole picture?", "colour?")


def wordpiece_tokenizer() -> PreTrainedTokenizerFast:
    backend = Tokenizer(models.WordPiece(unk_token="[UNK]"))
    backend.normalizer = normalizers.BertNormalizer()
    backend.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    special = ["[PAD]", "[UNK]", "[CLS]", "[SEP]"]
    backend.train_from_iterator([*QUESTIONS] * 9, trainers.WordPieceTrainer(vocab_size=90, special_tokens=special))
    backend.post_processor = processors.TemplateProcessing(
        "[CLS] $A [SEP]", special_tokens=[("[CLS]", 2), ("[SEP]", 3)]
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=backend, pad_token="[PAD]", unk_token="[UNK]", cls_token="[CLS]", sep_token="[SEP]"
    )


def byte_tokenizer() -> PreTrainedTokenizerFast:
    backend = Tokenizer(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=True, trim_offsets=False)
    backend.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(vocab_size=280, special_tokens=["<s>", "<pad>", "</s>"], initial_alphabet=alphabet)
    backend.train_from_iterator([*QUESTIONS] * 9, trainer)
    backend.post_processor = processors.TemplateProcessing("<s> $A </s>", special_tokens=[("<s>", 0), ("</s>", 2)])
    return PreTrainedTokenizerFast(tokenizer_object=backend, pad_token="<pad>", bos_token="<s>", eos_token="</s>")


@pytest.fixture(scope="session", autouse=True)
def cache(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """A cache folder of the tests' own, also for the programs that they start."""
    folder = tmp_path_factory.mktemp("cache")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("CVLM_CACHE", str(folder))
        yield folder


@pytest.fixture(scope="session")
def bert_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A random BERT of width 40 with a word-piece tokenizer, as `save_pretrained` writes it."""
    folder = tmp_path_factory.mktemp("tiny_bert")
    torch.manual_seed(1)
    sizes = {"num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 56, "hidden_size": 40}
    BertModel(BertConfig(vocab_size=90, max_position_embeddings=32, **sizes)).save_pretrained(folder)
    wordpiece_tokenizer().save_pretrained(folder)
    return folder


@pytest.fixture(scope="session")
def roberta_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A random RoBERTa of width 48 with a byte-level tokenizer."""
    folder = tmp_path_factory.mktemp("tiny_roberta")
    torch.manual_seed(2)
    sizes = {"num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 64, "hidden_size": 48}
    config = RobertaConfig(vocab_size=280, max_position_embeddings=66, pad_token_id=1, type_vocab_size=1, **sizes)
    RobertaModel(config).save_pretrained(folder)
    byte_tokenizer().save_pretrained(folder)
    return folder


@pytest.fixture(scope="session")
def tiny_spec(bert_folder: Path) -> Callable[..., StudentSpec]:
    """Makes a student of width 32: timm's test_vit (64 wide, 4x4 patches, one special token) and the tiny BERT."""

    def make(
        kind: str = "co_attention", *, vision: object = None, text: object = None, **fusion: object
    ) -> StudentSpec:
        return StudentSpec(
            vision=VisionSpec.model_validate(
                {"name": "timm:test_vit", "pretrained": False, "image_size": 64, **dict(vision or {})}
            ),
            text=TextSpec.model_validate({"name": f"hf:{bert_folder}", "max_length": 24, **dict(text or {})}),
            fusion=FusionSpec.model_validate({"kind": kind, "width": 32, "depth": 2, "heads": 4, **fusion}),
            embedding=24,
        )

    return make


@pytest.fixture
def paint(tmp_path: Path) -> Callable[..., PictureFile]:
    """Writes a PNG of one colour with some noise."""

    def make(name: str, colour: tuple[int, int, int], size: int = 20, seed: int = 0) -> PictureFile:
        noise = np.random.default_rng(seed).integers(-20, 20, (size, size + 4, 3))
        pixels = np.clip(np.array(colour) + noise, 0, 255).astype(np.uint8)
        path = tmp_path / f"{name}.png"
        Image.fromarray(pixels).save(path)
        return PictureFile(path)

    return make


@pytest.fixture
def colour_vqa(paint: Callable[..., PictureFile]) -> Callable[..., Examples]:
    """Makes `number` questions about the colour of pictures, two questions a picture."""

    def make(number: int = 12, split: str = "train") -> Examples:
        names = list(COLOURS)
        pictures = [
            paint(f"{split}{i}", COLOURS[names[i % 3]], size=16 + i % 5, seed=i) for i in range((number + 1) // 2)
        ]
        image_of = np.arange(number, dtype=np.int64) // 2
        texts, text_of = index_texts([QUESTIONS[i % len(QUESTIONS)] for i in range(number)])
        return Examples(
            name="colours",
            split=split,
            pictures=pictures,
            texts=texts,
            image_of=image_of,
            text_of=text_of,
            labels=image_of % 3,
            answers=tuple(names),
        )

    return make


@pytest.fixture
def colour_pairs(paint: Callable[..., PictureFile]) -> Callable[..., Examples]:
    """Makes `number` pictures with one caption each, for retrieval."""

    def make(number: int = 8, split: str = "test") -> Examples:
        names = list(COLOURS)
        index = np.arange(number, dtype=np.int64)
        return Examples(
            name="captions",
            split=split,
            pictures=[paint(f"{split}{i}", COLOURS[names[i % 3]], seed=i) for i in range(number)],
            texts=tuple(f"picture {i} is {names[i % 3]}" + " and nothing else" * (i % 2) for i in range(number)),
            image_of=index,
            text_of=index.copy(),
            labels=index.copy(),
        )

    return make
