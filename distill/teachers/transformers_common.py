"""Load a frozen Hugging Face model with its own tokenizer and image processor, and run those two."""

import hashlib
import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from PIL.Image import Image, Resampling
from torch import Tensor, nn

from distill.errors import DistillError

# Raise it when code in this folder changes what a signal holds: stored targets of older code are then refused.
SIGNAL_VERSION = 1


@dataclass(frozen=True, kw_only=True)
class Parts:
    """A frozen model with the preprocessing that it was trained with.

    Attributes:
        modules: all weights, in eval mode and without gradient.
        config: the model's configuration.
        tokenizer: a fast tokenizer; a slow one cannot tell where tokens sit in the string.
        image_processor: normalises pictures; resizing is done here.
        picture: height and width in pixels that the patch grid covers exactly.
        max_text: longest text in tokens, special ones included.
    """

    modules: nn.ModuleDict
    config: Any
    tokenizer: Any
    image_processor: Any
    picture: tuple[int, int]
    max_text: int

    @property
    def model(self) -> Any:
        """The model itself."""
        return self.modules["model"]

    @property
    def head(self) -> Any:
        """The answer head beside the model; KeyError if there is none."""
        return self.modules["head"]

    def fingerprint(self) -> str:
        """Sha256 over weights, configuration, tokenizer, image processor and the versions of the libraries."""
        tokenizer = json.loads(self.tokenizer.backend_tokenizer.to_str())
        # Calls leave their padding and truncation behind in the tokenizer; each call here sets both anew.
        tokenizer = {key: value for key, value in tokenizer.items() if key not in ("padding", "truncation")}
        config = {key: value for key, value in self.config.to_dict().items() if key != "_name_or_path"}
        facts = {
            "signal": SIGNAL_VERSION,
            "config": config,
            "tokenizer": tokenizer,
            "tokens": [self.tokenizer.pad_token_id, self.max_text],
            "image_processor": self.image_processor.to_dict(),
            "picture": self.picture,
            "libraries": {
                name: version(name) for name in ("torch", "torchvision", "transformers", "tokenizers", "pillow")
            },
        }
        return fingerprint_of(facts, self.modules)


def fingerprint_of(facts: Mapping[str, Any], modules: nn.Module) -> str:
    """Sha256 over everything that decides a signal: `facts`, and all weights."""
    digest = hashlib.sha256(json.dumps(facts, sort_keys=True, default=str).encode())
    for key, tensor in sorted(modules.state_dict().items()):
        digest.update(f"{key} {tensor.dtype} {tuple(tensor.shape)}".encode())
        digest.update(tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().data)
    return digest.hexdigest()


def read_config(name: str | Path, *, example: str = "facebook/flava-full") -> tuple[str, Any]:
    """Find a model of any type and read its configuration; see `load_config`."""
    from transformers import AutoConfig

    source = _source(name, example)
    return source, attempt(AutoConfig.from_pretrained, source, what="configuration")


def load_config(name: str | Path, *, model_type: str, example: str) -> tuple[str, Any]:
    """Find a model and read its configuration.

    Args:
        name: a hub name or a local folder.
        model_type: the type that the configuration must have.
        example: a hub name to offer in messages.

    Returns:
        What `from_pretrained` takes, and the configuration.

    Raises:
        DistillError: if the folder is missing, the hub has no such model or is out of reach, or it is another type.
    """
    source, config = read_config(name, example=example)
    if config.model_type != model_type:
        raise DistillError(
            f"{str(name)!r} is a model of type {config.model_type!r}, a {model_type} teacher needs {model_type!r}; "
            f"choose the teacher's kind that fits, or a model such as {example!r}"
        )
    return source, config


def load_parts(
    source: str, *, architecture: str, text_config: Any, picture: tuple[int, int], head: nn.Module | None = None
) -> Parts:
    """Load weights, tokenizer and image processor, and freeze everything.

    Args:
        source: what `load_config` returned.
        architecture: a model class in transformers.
        text_config: the configuration with `vocab_size` and `max_position_embeddings`.
        picture: height and width in pixels that the patch grid covers.
        head: an answer head beside the model.

    Raises:
        DistillError: if a file is missing or does not fit, weights are missing, or the tokenizer is slow or foreign.
    """
    import transformers

    model = load_model(source, getattr(transformers, architecture))
    tokenizer = attempt(transformers.AutoTokenizer.from_pretrained, source, what="tokenizer")
    _check_tokenizer(tokenizer, source, text_config)
    return Parts(
        modules=_frozen({"model": model} if head is None else {"model": model, "head": head}),
        config=model.config,
        tokenizer=tokenizer,
        image_processor=attempt(transformers.AutoImageProcessor.from_pretrained, source, what="image processor"),
        picture=picture,
        max_text=min(tokenizer.model_max_length, text_config.max_position_embeddings),
    )


def load_model(source: str, architecture: Any, **settings: Any) -> Any:
    """Load the weights of a model class, in evaluation mode and frozen; `settings` replace those for attention maps.

    Raises:
        DistillError: if they cannot be read, do not fit, or some are missing.
    """
    # Eager attention is the only one that returns probabilities. Float32 whatever the file holds: same maps everywhere.
    model, report = attempt(
        architecture.from_pretrained,
        source,
        what="weights",
        **{"attn_implementation": "eager", "dtype": torch.float32, **settings},
        output_loading_info=True,
    )
    # Unexpected weights are fine: checkpoints carry pretraining heads. A missing one would be left at random.
    if report["missing_keys"]:
        missing = sorted(report["missing_keys"])
        raise DistillError(
            f"{source!r} lacks {len(missing)} weights of {type(model).__name__}: {', '.join(missing[:5])}"
            f"{', ...' if len(missing) > 5 else ''}; give a complete checkpoint"
        )
    return model.eval().requires_grad_(False)


def patch_grid(image_size: Any, patch_size: Any, *, name: str) -> tuple[int, int]:
    """Rows and columns of patches.

    Raises:
        DistillError: if patches do not tile the picture, for the rest would be a strip that no token sees.
    """
    height, width = height_width(image_size)
    patch_height, patch_width = height_width(patch_size)
    if height % patch_height or width % patch_width:
        raise DistillError(
            f"{name}: patches of {patch_height}x{patch_width} pixels do not tile a picture of {height}x{width}; "
            f"use a model whose image size is a multiple of its patch size"
        )
    return height // patch_height, width // patch_width


def height_width(size: Any) -> tuple[int, int]:
    """Height and width of a size in a configuration, which is one number for squares."""
    height, width = (size, size) if isinstance(size, int) else size
    return int(height), int(width)


def tokens(parts: Parts, texts: Sequence[str]) -> dict[str, Tensor]:
    """Tokenise texts, padded on the right to the longest.

    Returns:
        `input_ids`, `attention_mask` (and `token_type_ids`) `[b, n_text]`, and `spans` `[b, n_text, 2]`: characters
        of each token, (0, 0) for special tokens and padding.
    """
    encoded = parts.tokenizer(
        list(texts),
        padding="longest",
        # Positions are counted from the left; padding there would move every token.
        padding_side="right",
        truncation=True,
        max_length=parts.max_text,
        return_offsets_mapping=True,
        return_special_tokens_mask=True,
        return_attention_mask=True,
        return_tensors="pt",
    )
    special = encoded.pop("special_tokens_mask").bool() | ~encoded["attention_mask"].bool()
    offsets = encoded.pop("offset_mapping").masked_fill(special[..., None], 0)
    spans = [[_trim(text, *span) for span in row] for text, row in zip(texts, offsets.tolist(), strict=True)]
    return {**encoded, "spans": torch.tensor(spans, dtype=torch.long)}


def pixels(parts: Parts, images: Sequence[Image]) -> Tensor:
    """Resize whole pictures to the model's size and normalise them: `[b, 3, h, w]`.

    Processors crop the middle (FLAVA) or keep the aspect ratio and pad (ViLT). Then the patch grid no longer covers the
    picture, and its cells could not be matched with a student's.
    """
    height, width = parts.picture
    resample = Resampling(getattr(parts.image_processor, "resample", None) or Resampling.BICUBIC)
    resized = [image.convert("RGB").resize((width, height), resample) for image in images]
    batch = parts.image_processor(resized, do_resize=False, do_center_crop=False, do_pad=False, return_tensors="pt")
    values: Tensor = batch["pixel_values"]
    return values


def _trim(text: str, start: int, end: int) -> tuple[int, int]:
    """A span without the white space around it; some tokenizers count the space before a word as part of it."""
    while start < end and text[start].isspace():
        start += 1
    while end > start and text[end - 1].isspace():
        end -= 1
    return (start, end) if end > start else (0, 0)


def _source(name: str | Path, example: str) -> str:
    folder = Path(name).expanduser()
    if folder.is_dir():
        return str(folder)
    text = str(name)
    # A hub name is `owner/model` or `model`; anything else can only have been meant as a folder.
    if isinstance(name, Path) or text[:1] in ("/", ".", "~") or text.count("/") > 1:
        raise DistillError(
            f"no folder {text!r}; give a folder written by save_pretrained (model, tokenizer and image processor), or "
            f"a hub name such as {example!r}"
        )
    return text


def attempt(load: Callable[..., Any], source: str, *, what: str, repair: str | None = None, **settings: Any) -> Any:
    """Load a part of a model, or say which part of which model is missing and how to get it (`repair`)."""
    try:
        return load(source, **settings)
    # RuntimeError: sizes differ. ValueError, KeyError, TypeError: transformers on files that it cannot make sense of.
    except (OSError, ValueError, RuntimeError, KeyError, TypeError, ImportError) as error:
        reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        advice = repair or (
            "save the model, its tokenizer and its image processor into that folder with save_pretrained"
            if Path(source).is_dir()
            else f"check the name and the connection, or fetch it once with `hf download {source}` and give the folder"
        )
        raise DistillError(f"could not load the {what} of {source!r}: {reason}; {advice}") from error


def _check_tokenizer(tokenizer: Any, source: str, text_config: Any) -> None:
    if not getattr(tokenizer, "is_fast", False):
        raise DistillError(
            f"the tokenizer of {source!r} ({type(tokenizer).__name__}) is slow and cannot tell where tokens sit in the "
            f"string, which alignment needs; convert it to a fast one (tokenizer.json) and save it there"
        )
    # Without tokenizer files transformers builds one that knows special tokens only, and every word becomes unknown.
    if len(tokenizer) <= len(set(tokenizer.all_special_ids)):
        raise DistillError(
            f"could not load the tokenizer of {source!r}: there is no vocabulary; save the tokenizer that the model "
            f"was trained with there"
        )
    if len(tokenizer) > text_config.vocab_size or tokenizer.pad_token_id is None:
        raise DistillError(
            f"the tokenizer of {source!r} has {len(tokenizer)} tokens and padding token {tokenizer.pad_token!r}, the "
            f"model {text_config.vocab_size} embeddings; save the tokenizer that the model was trained with there"
        )


def _frozen(modules: Mapping[str, nn.Module]) -> nn.ModuleDict:
    frozen = nn.ModuleDict(dict(modules)).eval()
    frozen.requires_grad_(False)
    return frozen
