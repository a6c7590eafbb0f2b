"""Text encoders from transformers: BERT, RoBERTa, DeBERTa, MPNet, CLIP, the encoder half of T5 and their like."""

import hashlib
import json
import logging
from collections.abc import Sequence
from typing import Any

from torch import Tensor, nn

from cvlm.config import TextSpec
from cvlm.encoders.base import EncoderOutput
from cvlm.encoders.fetch import fetching
from cvlm.encoders.hf_load import cut_after, load_model, read_config, source_of, states_of
from cvlm.encoders.text_tokens import Span, pad_batch, text_output, trim
from cvlm.encoders.tower import Tower
from cvlm.errors import CvlmError

logger = logging.getLogger(__name__)


def build(name: str, spec: TextSpec) -> nn.Module:
    """Build `hf:NAME` for a hub name or a local folder.

    Raises:
        CvlmError: the folder or name is wrong, the tokenizer is not a fast one, or the layer does not exist.
    """
    from transformers import AutoTokenizer

    config = read_config(name)
    with fetching(f"hf:{name}"):
        tokenizer = AutoTokenizer.from_pretrained(source_of(name))
    model: Any = load_model(name, config, "text", spec.pretrained)
    if model.config.is_encoder_decoder:
        model = model.get_encoder()
    return HfText(model, tokenizer, max_length=spec.max_length, layer=spec.layer)


class HfText(Tower):
    """A text model of transformers with its fast tokenizer.

    Args:
        model: takes `input_ids` and `attention_mask` and returns `last_hidden_state`.
        tokenizer: a fast tokenizer; only those say which characters a token stands for.
        max_length: longer texts are cut to this many tokens, or to what the model takes if that is less.
        layer: None takes the last hidden state; a number the raw output of that block, counted without the
            embeddings, and everything behind it is removed.

    Raises:
        CvlmError: the tokenizer is a slow one, empty, or cannot pad, or there is no such layer.
    """

    def __init__(self, model: nn.Module, tokenizer: Any, *, max_length: int = 64, layer: int | None = None) -> None:
        super().__init__(model, "")
        self.tokenizer = tokenizer
        self.padding = _padding_of(tokenizer)
        self.max_length = _fitting_length(model, tokenizer, max_length)
        self.preprocessing = f"layer {layer} | {_describe(tokenizer)} max_length {self.max_length}"
        self.block = None if layer is None else cut_after(model, layer)
        self.settle(self.prepare(["a"]))

    def prepare(self, inputs: Sequence[str]) -> dict[str, Tensor]:
        """Tokenize texts.

        Returns:
            `input_ids` and `attention_mask` `[b, n]`, `spans` `[b, n, 2]` in characters of the given strings.
        """
        encoded = self.tokenizer(
            list(inputs),
            truncation=True,
            max_length=self.max_length,
            return_offsets_mapping=True,
            return_special_tokens_mask=True,
        )
        rows: list[tuple[list[int], list[Span]]] = []
        for row, text in enumerate(inputs):
            pairs = zip(encoded["offset_mapping"][row], encoded["special_tokens_mask"][row], strict=True)
            spans = [(0, 0) if special else trim(text, start, end) for (start, end), special in pairs]
            # An empty text without special tokens still needs one position that attention may look at.
            rows.append((list(encoded["input_ids"][row]), spans) if spans else ([self.padding], [(0, 0)]))
        return pad_batch(rows, self.padding)

    def forward(self, input_ids: Tensor, attention_mask: Tensor, spans: Tensor) -> EncoderOutput:
        """Encode what `prepare` returned."""
        block = None if self.block is None else self.model.get_submodule(self.block)
        states = states_of(lambda: self.model(input_ids=input_ids, attention_mask=attention_mask), block)
        return text_output(states, attention_mask, spans)


def _padding_of(tokenizer: Any) -> int:
    """Return the id to pad with: the padding token, else the end of text, which the mask hides as well."""
    if not tokenizer.is_fast:
        raise CvlmError(
            f"{type(tokenizer).__name__} of {tokenizer.name_or_path!r} is a slow tokenizer, which does not say where "
            "its tokens stand in the text; convert it to a tokenizer.json, or use another text encoder"
        )
    if len(tokenizer) <= len(set(tokenizer.all_special_ids)):
        # transformers builds an empty tokenizer, without a word, for a folder that holds none.
        raise CvlmError(
            f"{tokenizer.name_or_path!r} holds no tokenizer vocabulary; save the tokenizer into the same folder"
        )
    for token in (tokenizer.pad_token_id, tokenizer.eos_token_id):
        if token is not None:
            return int(token)
    raise CvlmError(
        f"{type(tokenizer).__name__} of {tokenizer.name_or_path!r} has neither a padding nor an end token; "
        "set tokenizer.pad_token and save it again"
    )


def _fitting_length(model: nn.Module, tokenizer: Any, wanted: int) -> int:
    """Limit a length to the tokenizer's, the configuration's, and the rows of the position table."""
    config: Any = model.config
    limits = [wanted, tokenizer.model_max_length, getattr(config, "max_position_embeddings", None) or wanted]
    for name, module in model.named_modules():
        if isinstance(module, nn.Embedding) and name.endswith(("position_embeddings", "position_embedding", "wpe")):
            # RoBERTa starts to count behind its padding index.
            offset = 0 if module.padding_idx is None else module.padding_idx + 1
            limits.append(module.num_embeddings - offset)
    length = int(min(limits))
    if length < wanted:
        logger.warning("%s takes %d tokens: max_length %d is lowered", type(model).__name__, length, wanted)
    return length


def _describe(tokenizer: Any) -> str:
    """Name a tokenizer by its class and what it does, without the cut and padding of its latest call."""
    settings = json.loads(tokenizer.backend_tokenizer.to_str())
    settings.pop("truncation", None)
    settings.pop("padding", None)
    digest = hashlib.sha256(json.dumps(settings, sort_keys=True).encode()).hexdigest()
    return f"{type(tokenizer).__name__} {digest}"
