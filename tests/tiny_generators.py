"""Tiny random LLaVA and Qwen2-VL models with processors, saved as the real classes save themselves."""

from pathlib import Path

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

SPECIAL = ["<pad>", "<s>", "</s>", "<unk>", "<image>", "<|vision_start|>", "<|vision_end|>", "<video>"]
CHAT = (
    "{% for m in messages %}USER: {% for c in m['content'] %}"
    "{% if c['type'] == 'image' %}IMAGE{% else %}{{ c['text'] }}{% endif %}"
    "{% endfor %}{% endfor %}{% if add_generation_prompt %} ASSISTANT:{% endif %}"
)


def tokenizer(**named: str) -> PreTrainedTokenizerFast:
    """One token per byte, so that answers have unlike numbers of tokens."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    words = {word: number for number, word in enumerate([*SPECIAL, *alphabet])}
    backend = Tokenizer(models.BPE(vocab=words, merges=[("r", "e")] if "re" in words else [], unk_token="<unk>"))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    return PreTrainedTokenizerFast(
        tokenizer_object=backend,
        pad_token="<pad>",
        bos_token="<s>",
        eos_token="</s>",
        unk_token="<unk>",
        additional_special_tokens=SPECIAL[4:],
        extra_special_tokens=named,
    )


def wide(model: torch.nn.Module) -> torch.nn.Module:
    """Wide random weights: the default start is so narrow that every answer is as likely as the next."""
    generator = torch.Generator().manual_seed(4)
    with torch.no_grad():
        for name, weight in model.named_parameters():
            if "norm" not in name.lower():
                weight.normal_(0.0, 0.15, generator=generator)
    return model


def save_llava(folder: Path, *, chat: bool) -> Path:
    """Save a LLaVA: a CLIP vision tower and a Llama."""
    from transformers import (
        CLIPImageProcessor,
        CLIPVisionConfig,
        LlamaConfig,
        LlavaConfig,
        LlavaForConditionalGeneration,
        LlavaProcessor,
    )

    text = tokenizer(image_token="<image>")
    config = LlavaConfig(
        vision_config=CLIPVisionConfig(
            hidden_size=24,
            intermediate_size=32,
            num_hidden_layers=2,
            num_attention_heads=3,
            image_size=32,
            patch_size=8,
        ),
        text_config=LlamaConfig(
            vocab_size=len(text),
            hidden_size=40,
            intermediate_size=56,
            num_hidden_layers=2,
            num_attention_heads=5,
            num_key_value_heads=1,
            eos_token_id=2,
            bos_token_id=1,
            pad_token_id=0,
        ),
        image_token_index=SPECIAL.index("<image>"),
        vision_feature_layer=-1,
    )
    wide(LlavaForConditionalGeneration(config)).save_pretrained(folder)
    LlavaProcessor(
        image_processor=CLIPImageProcessor(size={"shortest_edge": 32}, crop_size={"height": 32, "width": 32}),
        tokenizer=text,
        patch_size=8,
        vision_feature_select_strategy="default",
        num_additional_image_tokens=1,
        image_token="<image>",
        chat_template=CHAT.replace("IMAGE", "<image>") if chat else None,
    ).save_pretrained(folder)
    return folder


def save_qwen(folder: Path) -> Path:
    """Save a Qwen2-VL, whose text positions lag behind the number of its tokens by what the picture folds up."""
    from transformers import (
        Qwen2VLConfig,
        Qwen2VLForConditionalGeneration,
        Qwen2VLImageProcessor,
        Qwen2VLProcessor,
        Qwen2VLVideoProcessor,
    )

    text = tokenizer(image_token="<image>", video_token="<video>")
    config = Qwen2VLConfig(
        text_config={
            "vocab_size": len(text),
            "hidden_size": 32,
            "intermediate_size": 48,
            "num_hidden_layers": 2,
            "num_attention_heads": 4,
            "num_key_value_heads": 2,
            "rope_parameters": {"rope_type": "default", "mrope_section": [1, 1, 2], "rope_theta": 10000.0},
            "eos_token_id": 2,
            "bos_token_id": 1,
            "pad_token_id": 0,
        },
        vision_config={"depth": 1, "embed_dim": 16, "hidden_size": 32, "num_heads": 2, "mlp_ratio": 2, "patch_size": 4},
        image_token_id=SPECIAL.index("<image>"),
        video_token_id=SPECIAL.index("<video>"),
        vision_start_token_id=SPECIAL.index("<|vision_start|>"),
        vision_end_token_id=SPECIAL.index("<|vision_end|>"),
    )
    wide(Qwen2VLForConditionalGeneration(config)).save_pretrained(folder)
    sizes = {"patch_size": 4, "size": {"shortest_edge": 256, "longest_edge": 2048}}
    Qwen2VLProcessor(
        image_processor=Qwen2VLImageProcessor(**sizes),
        tokenizer=text,
        video_processor=Qwen2VLVideoProcessor(**sizes),
        chat_template=CHAT.replace("IMAGE", "<|vision_start|><image><|vision_end|>"),
    ).save_pretrained(folder)
    return folder
