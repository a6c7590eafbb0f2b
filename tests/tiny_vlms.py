"""Tiny random FLAVA, ViLT, BLIP, BridgeTower and GIT models, saved as the real classes save themselves."""

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
ANSWER_WORDS = [*WORDS, "yes", "no", "two", "blue"]
"""Words that write every answer."""


def spread(model: torch.nn.Module) -> torch.nn.Module:
    """Wide random weights: the default start is so narrow that attention is flat and class tokens are zero."""
    generator = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for name, weight in model.named_parameters():
            if name != "logit_scale" and "norm" not in name.lower() and ".ln_" not in name:
                weight.normal_(0.0, 0.2, generator=generator)
    return model


def save_processors(folder: Path, image_processor: object, words: list[str] = WORDS) -> None:
    from transformers import BertTokenizerFast

    folder.mkdir(parents=True, exist_ok=True)
    (folder / "words.txt").write_text("\n".join(words))
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


def save_blip(folder: Path, head: str, words: list[str] = ANSWER_WORDS) -> Path:
    """Save a `BlipForQuestionAnswering`, a `BlipForImageTextRetrieval` or another class of BLIP."""
    import transformers

    # The decoder of answers reads the text encoder, which reads the picture: with it both widths must be one.
    width = D_TEXT if head == "BlipForQuestionAnswering" else D_IMAGE
    text = {"hidden_size": D_TEXT, "encoder_hidden_size": width, "num_attention_heads": 6, "intermediate_size": 56}
    text |= {"num_hidden_layers": DEPTH, "vocab_size": len(words) + 3, "max_position_embeddings": MAX_TEXT}
    text |= {"bos_token_id": len(words), "sep_token_id": 3, "pad_token_id": 0, "hidden_dropout_prob": 0.1}
    vision = {"hidden_size": width, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 56}
    config = transformers.BlipConfig(
        text_config=text,
        vision_config={**vision, "image_size": SIZE, "patch_size": PATCH},
        image_text_hidden_size=D_SHARED,
        projection_dim=D_SHARED,
    )
    spread(getattr(transformers, head)(config)).save_pretrained(folder)
    save_processors(folder, transformers.BlipImageProcessor(), words)
    return folder


def save_bridgetower(folder: Path, head: str) -> Path:
    """Save a `BridgeTowerModel`, `BridgeTowerForImageAndTextRetrieval` or `BridgeTowerForContrastiveLearning`."""
    import transformers

    layers = 4  # of each tower; the last of them are bridged to the cross-modal layers
    # Vision heads are 64 wide. The contrastive class adds the image's type before it changes the width.
    width, heads = (64, 4) if head == "BridgeTowerForContrastiveLearning" else (D_JOINT, HEADS)
    text = {"hidden_size": width, "num_hidden_layers": layers, "num_attention_heads": heads, "intermediate_size": 56}
    text |= {"vocab_size": len(WORDS) + 3, "max_position_embeddings": MAX_TEXT + 1, "pad_token_id": 0}
    config = transformers.BridgeTowerConfig(
        text_config=text,
        vision_config={"hidden_size": 64, "num_hidden_layers": layers, "image_size": SIZE, "patch_size": PATCH},
        hidden_size=width,
        num_hidden_layers=DEPTH,
        num_attention_heads=heads,
        contrastive_hidden_size=D_SHARED,
        logit_scale_init_value=2.6592,
    )
    spread(getattr(transformers, head)(config)).save_pretrained(folder)
    save_processors(folder, transformers.BridgeTowerImageProcessor())
    return folder


def save_git(folder: Path, words: list[str] = ANSWER_WORDS, **settings: object) -> Path:
    """Save a `GitForCausalLM`."""
    import transformers

    vision = {"hidden_size": D_IMAGE, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 56}
    config = transformers.GitConfig(
        vision_config={**vision, "image_size": SIZE, "patch_size": PATCH},
        hidden_size=D_JOINT,
        num_hidden_layers=DEPTH,
        num_attention_heads=HEADS,
        intermediate_size=56,
        vocab_size=len(words) + 3,
        max_position_embeddings=MAX_TEXT,
        bos_token_id=2,
        eos_token_id=3,
        pad_token_id=0,
        **settings,
    )
    spread(transformers.GitForCausalLM(config)).save_pretrained(folder)
    save_processors(folder, transformers.CLIPImageProcessor(), words)
    return folder
