"""GIT as a teacher: one decoder that reads the image, then the question, and writes the answer."""

import copy
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from PIL.Image import Image
from torch import Tensor

from distill.errors import DistillError
from distill.layout import ImageLayout
from distill.signal import PROJECTIONS, Request
from distill.teachers.answer_scores import AnswerTokens, answer_tokens, log_likelihood, with_answers
from distill.teachers.joint import cut_block, recorded_projections, text_fields
from distill.teachers.pair import PairTeacher
from distill.teachers.transformers_common import height_width, load_config, load_parts, patch_grid

EXAMPLE = "microsoft/git-base-vqav2"


class GitTeacher(PairTeacher):
    """A teacher from `transformers.GitForCausalLM` (Wang et al., TMLR 2022, arXiv:2205.14100).

    The sequence is `[image CLS] patches [CLS] question answer [SEP]`; image tokens see each other, text tokens what
    stands before them. What its signal holds: `text_to_image`, cut out of the joint attention of the question's tokens
    and scaled to one; `hidden`, `queries`, `keys` and `values` at these; `pooled`, the last state of the question's
    last token, from which the answer's first is written; and if `answers` are given, `logits`, the mean
    log-probability of the tokens of each answer and its end. Image tokens never look at the text, so there is no
    `image_to_text`.

    Image and question are read once; every answer goes on from their stored keys and values.

    Args:
        name: a hub name such as `microsoft/git-base-vqav2`, or a folder with model, tokenizer and image processor.
        answers: the vocabulary to score.

    Raises:
        DistillError: if anything cannot be loaded or is no GIT for pictures, or the tokenizer cannot write an answer.
    """

    def __init__(self, name: str | Path, *, answers: Sequence[str] | None = None) -> None:
        source, config = load_config(name, model_type="git", example=EXAMPLE)
        if config.num_image_with_embedding is not None:
            raise DistillError(
                f"git ({name}) reads {config.num_image_with_embedding} frames of a film; give one for pictures, "
                f"such as {EXAMPLE!r}"
            )
        vision = config.vision_config
        grid = patch_grid(vision.image_size, vision.patch_size, name=f"git ({name})")
        parts = load_parts(
            source, architecture="GitForCausalLM", text_config=config, picture=height_width(vision.image_size)
        )
        fields = frozenset({"text_to_image", "hidden", *PROJECTIONS, "pooled"})
        self._tokens = None
        if answers is not None:
            end = parts.tokenizer.sep_token_id
            self._tokens = answer_tokens(parts.tokenizer, answers, end=end, name=f"git ({name})")
            # Question and answer share the positions. The answer's end is scored and not read, and `prepare` leaves out
            # the question's [SEP].
            room = min(parts.max_text, config.max_position_embeddings - self._tokens.ids.shape[1] + 2)
            parts = replace(parts, max_text=room)
            fields |= {"logits"}
        super().__init__(
            name=f"git ({name})",
            parts=parts,
            fields=fields,
            depth=config.num_hidden_layers,
            image_layout=ImageLayout(grid=grid, special=1),
        )
        self.answers = None if answers is None else tuple(answers)
        self.fingerprint = with_answers(self.fingerprint, answers)

    def prepare(self, images: Sequence[Image], texts: Sequence[str]) -> dict[str, Tensor]:
        """Preprocess pairs as `PairTeacher` does, and leave out the `[SEP]` behind the text, for the answer follows."""
        inputs = super().prepare(images, texts)
        mask = inputs["attention_mask"]
        last = torch.arange(mask.shape[1]) == mask.sum(1, keepdim=True) - 1
        inputs["input_ids"] = inputs["input_ids"].masked_fill(last, self._parts.tokenizer.pad_token_id)
        inputs["attention_mask"] = mask.masked_fill(last, 0)
        return {key: value if key == "pixel_values" else value[:, :-1] for key, value in inputs.items()}

    def _record(self, inputs: Mapping[str, Tensor], request: Request) -> dict[str, Any]:
        model, mask = self._parts.model, inputs["attention_mask"]
        with recorded_projections(model.git.encoder.layer, request, path="attention.self") as projections:
            output = model.git(
                input_ids=inputs["input_ids"],
                attention_mask=mask,
                pixel_values=inputs["pixel_values"],
                use_cache=True,
                output_attentions=bool(request.attention_layers),
                output_hidden_states=bool(request.hidden_layers),
            )
        image = slice(0, self.image_layout.tokens)
        text = slice(image.stop, image.stop + mask.shape[1])
        states = output.hidden_states[1:] if output.hidden_states else None
        found: dict[str, Any] = dict(text_fields(request, states=states, projections=projections, text=text))
        if request.attention_layers:
            maps = output.attentions
            layers = sorted(request.attention_layers)
            found["text_to_image"] = {i: cut_block(maps[i], queries=text, keys=image) for i in layers} if maps else None
        every = torch.arange(len(mask), device=mask.device)
        pooled = output.last_hidden_state[every, image.stop + mask.sum(1) - 1]
        if "pooled" in request.fields:
            found["pooled"] = pooled
        if "logits" in request.fields and self._tokens is not None:
            chunks = self._tokens.chunks(len(mask), mask.device)
            scores = [self._score(model.output(pooled), output.past_key_values, mask, chunk) for chunk in chunks]
            found["logits"] = torch.cat(scores, dim=1)
        return found

    def _score(self, first: Tensor, read: Any, mask: Tensor, answers: AnswerTokens) -> Tensor:
        """Score answers `[b, a]`.

        Args:
            first: `[b, words]` scores of the answer's first token.
            read: keys and values of image and question.
            mask: `[b, n_text]` of the question.
            answers: the answers.
        """
        model, (number, repeats) = self._parts.model, (len(mask), len(answers))
        cache = copy.deepcopy(read)  # the model appends to it
        cache.batch_repeat_interleave(repeats)
        written = answers.ids[:, :-1]
        places = mask.sum(1)[:, None, None] + torch.arange(written.shape[1], device=mask.device)
        embedded = model.git.embeddings(
            input_ids=written.repeat(number, 1), position_ids=places.expand(-1, repeats, -1).flatten(0, 1)
        )
        # Straight to the encoder, for what GitModel makes of a mask beside stored keys differs between versions.
        seen = self._seen(mask, written.shape[1]).repeat_interleave(repeats, dim=0)
        barred = torch.zeros(seen.shape, device=mask.device).masked_fill(~seen, torch.finfo(torch.float32).min)
        states = model.git.encoder(embedded, barred[:, None], past_key_values=cache).last_hidden_state
        later = model.output(states).unflatten(0, (number, repeats))
        scores = torch.cat([first[:, None, None].expand(-1, repeats, -1, -1), later], dim=2)
        return log_likelihood(scores, answers, mean=True)

    def _seen(self, mask: Tensor, written: int) -> Tensor:
        """Return `[b, written, n_image + n_text + written]`, True where an answer's token may look.

        Padding of a shorter answer stands behind its tokens, which look back only.
        """
        shape = (len(mask), written)
        image = mask.new_ones(*shape, self.image_layout.tokens, dtype=torch.bool)
        question = mask.bool()[:, None].expand(*shape, -1)
        answer = mask.new_ones(written, written, dtype=torch.bool).tril().expand(*shape, -1)
        return torch.cat([image, question, answer], dim=2)
