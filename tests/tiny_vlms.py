"""Tiny random FLAVA and ViLT models, saved as the real classes save themselves."""

from pathlib import Path

import torch

# Widths, heads, depths and lengths all differ, so that no axis can be taken for another.
D_IMAGE, D_TEXT, D_JOINT, D_SHARED = 32, 48, 40, 24
HEADS, DEPTH, MAX_TEXT = 5, 3, 14
SIZE, PATCH = 32, 8
GRID = (4, 4)
N_IMAGE = 17
ANSWERS = ("yes", "no", "red", "two", "a cat", "blue")
WORDS = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", "is", "the", "cat", "red", "##dish", "a", "dog", "?"]


def spread(model: torch.nn.Module) -> torch.nn.Module:
    """Wide random weights: the default start is so narrow that attention is flat and class tokens are zero."""
    generator = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for name, weight in model.named_parameters():
            if name != "logit_scale" and "layernorm" not in name.lower():
                weight.normal_(0.0, 0.2, generator=generator)
    return model


def save_processors(folder: Path, image_processor: object) -> None:
    from transformers import BertTokenizerFast

    (folder / "words.txt").write_text("\n".join(WORDS))
    BertTokenizerFast(str(folder / "words.txt")).save_pretrained(folder)
    image_processor.save_pretrained(folder)


def save_flava(folder: Path) -> Path:
    """Save a FLAVA whose axes all have their own width."""
    from transformers import FlavaConfig, FlavaImageProcessor, FlavaModel

    common = {"intermediate_size": 56, "hidden_dropout_prob": 0.1, "attention_probs_dropout_prob": 0.1}
    config = FlavaConfig(
        image_config={"hidden_size": D_IMAGE, "num_hidden_layers": 2, "num_attention_heads": 4, **common}
        | {"image_size": SIZE, "patch_size": PATCH},
        text_config={"hidden_size": D_TEXT, "num_hidden_layers": 1, "num_attention_heads": 6, **common}
        | {"vocab_size": len(WORDS) + 3, "max_position_embeddings": MAX_TEXT},
        multimodal_config={"hidden_size": D_JOINT, "num_hidden_layers": DEPTH, "num_attention_heads": HEADS, **common},
        image_codebook_config={},
        hidden_size=D_JOINT,
        projection_dim=D_SHARED,
    )
    spread(FlavaModel(config)).save_pretrained(folder)
    save_processors(folder, FlavaImageProcessor())
    return folder


def save_vilt(folder: Path) -> Path:
    """Save a ViLT for question answering."""
    from transformers import ViltConfig, ViltForQuestionAnswering, ViltImageProcessor

    config = ViltConfig(
        hidden_size=D_JOINT,
        num_hidden_layers=DEPTH,
        num_attention_heads=HEADS,
        intermediate_size=56,
        hidden_dropout_prob=0.1,
        image_size=SIZE,
        patch_size=PATCH,
        vocab_size=len(WORDS) + 3,
        max_position_embeddings=MAX_TEXT,
        id2label=dict(enumerate(ANSWERS)),
    )
    spread(ViltForQuestionAnswering(config)).save_pretrained(folder)
    save_processors(folder, ViltImageProcessor())
    return folder
