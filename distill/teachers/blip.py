"""BLIP as a teacher: its text encoder looks at the picture through cross-attention."""

from abc import abstractmethod
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import normalize

from distill.errors import DistillError
from distill.layout import ImageLayout
from distill.signal import PROJECTIONS, Request
from distill.teachers.answer_scores import AnswerTokens, answer_tokens, log_likelihood, with_answers
from distill.teachers.joint import recorded_projections, text_fields
from distill.teachers.pair import PairTeacher
from distill.teachers.transformers_common import height_width, load_config, load_parts, patch_grid

EXAMPLE = "Salesforce/blip-vqa-base"
QUESTIONS, MATCHING = "BlipForQuestionAnswering", "BlipForImageTextRetrieval"
NO_YES = ("no", "yes")


class BlipTeacher(PairTeacher):
    """What BLIP teachers of both heads share (Li et al., ICML 2022, arXiv:2201.12086).

    Image tokens are `[CLS] patches`. A text starts with `[CLS]`, as in transformers; the authors' code has `[ENC]`
    there. What every signal holds: `text_to_image` of the text encoder's cross-attention, `hidden`, and `queries`,
    `keys` and `values` of its self-attention. Image tokens never look at the text, so there is no `image_to_text`.
    """

    def __init__(self, name: str | Path, source: str, config: Any, *, architecture: str, fields: set[str]) -> None:
        vision = config.vision_config
        grid = patch_grid(vision.image_size, vision.patch_size, name=f"blip ({name})")
        parts = load_parts(
            source,
            architecture=architecture,
            text_config=config.text_config,
            picture=height_width(vision.image_size),
        )
        super().__init__(
            name=f"blip ({name})",
            parts=parts,
            fields=frozenset({"text_to_image", "hidden", *PROJECTIONS} | fields),
            depth=config.text_config.num_hidden_layers,
            image_layout=ImageLayout(grid=grid, special=1),
        )

    @abstractmethod
    def _head(self, image: Tensor, text: Tensor, inputs: Mapping[str, Tensor], request: Request) -> dict[str, Any]:
        """Return the requested fields of the head, from `image` `[b, n_image, d]` and `text` `[b, n_text, d]`."""

    def _record(self, inputs: Mapping[str, Tensor], request: Request) -> dict[str, Any]:
        model = self._parts.model
        image = model.vision_model(pixel_values=inputs["pixel_values"]).last_hidden_state
        with recorded_projections(model.text_encoder.encoder.layer, request, path="attention.self") as projections:
            output = self._read(
                image,
                inputs,
                output_attentions=bool(request.attention_layers),
                output_hidden_states=bool(request.hidden_layers),
            )
        states = output.hidden_states[1:] if output.hidden_states else None
        found: dict[str, Any] = dict(text_fields(request, states=states, projections=projections))
        if request.attention_layers:
            maps = output.cross_attentions
            found["text_to_image"] = {i: maps[i] for i in sorted(request.attention_layers)} if maps else None
        return found | self._head(image, output.last_hidden_state, inputs, request)

    def _read(self, image: Tensor | None, inputs: Mapping[str, Tensor], **settings: Any) -> Any:
        """Run the text encoder, on the text alone where `image` is None."""
        seen = None if image is None else torch.ones(image.shape[:2], dtype=torch.long, device=image.device)
        return self._parts.model.text_encoder(
            input_ids=inputs["input_ids"],
            attention_mask=inputs["attention_mask"],
            encoder_hidden_states=image,
            encoder_attention_mask=seen,
            **settings,
        )


class BlipAnswerer(BlipTeacher):
    """A teacher from `transformers.BlipForQuestionAnswering`, which writes its answers.

    `logits`, if `answers` are given: `log p(answer | image, question)`, the decoder's log-probabilities of the answer's
    tokens and its end, summed. It is the score of the authors' `rank_answer`, which computes it for the answers whose
    first token is likeliest alone, and with label smoothing; here every answer has one, without.

    Raises:
        DistillError: if anything cannot be loaded, or the tokenizer cannot write an answer.
    """

    def __init__(self, name: str | Path, source: str, config: Any, answers: Sequence[str] | None) -> None:
        fields = {"logits"} if answers is not None else set()
        super().__init__(name, source, config, architecture=QUESTIONS, fields=fields)
        self.answers = None if answers is None else tuple(answers)
        self.fingerprint = with_answers(self.fingerprint, answers)
        self._tokens = None
        if answers is not None:
            end = config.text_config.sep_token_id
            self._tokens = answer_tokens(self._parts.tokenizer, answers, end=end, name=self.name)
        # The decoder's layers lose the mask of the question on the way, and would read its padding.
        for layer in self._parts.model.text_decoder.bert.encoder.layer:
            layer.crossattention.self.register_forward_pre_hook(_keep_mask, with_kwargs=True)

    def _head(self, image: Tensor, text: Tensor, inputs: Mapping[str, Tensor], request: Request) -> dict[str, Any]:
        if "logits" not in request.fields or self._tokens is None:
            return {}
        chunks = self._tokens.chunks(len(text), text.device)
        return {"logits": torch.cat([self._score(text, inputs["attention_mask"], chunk) for chunk in chunks], dim=1)}

    def _score(self, question: Tensor, question_mask: Tensor, answers: AnswerTokens) -> Tensor:
        """Score answers `[b, a]` from question states `[b, n_text, d]`."""
        number, repeats = len(question), len(answers)
        start = torch.full_like(answers.ids[:, :1], self._parts.model.decoder_start_token_id)
        read = torch.cat([start, answers.ids[:, :-1]], dim=1)
        seen = torch.cat([torch.ones_like(start), answers.mask[:, :-1].long()], dim=1)
        output = self._parts.model.text_decoder(
            input_ids=read.repeat(number, 1),
            attention_mask=seen.repeat(number, 1),
            encoder_hidden_states=question.repeat_interleave(repeats, dim=0),
            encoder_attention_mask=question_mask.repeat_interleave(repeats, dim=0),
            use_cache=False,
        )
        return log_likelihood(output.logits.unflatten(0, (number, repeats)), answers, mean=False)


class BlipMatcher(BlipTeacher):
    """A teacher from `transformers.BlipForImageTextRetrieval`.

    Further fields: `logits` over `no` and `yes`, the matching head on the state of the first text token; `pooled`, that
    state; `image_embedding` and `text_embedding`; and `similarity`, BLIP's ranking score: the cosine plus the logit of
    `yes`, for every image with every text, so `b` passes of the text encoder over `b` texts.

    Raises:
        DistillError: if anything cannot be loaded, or `answers` are not `no` and `yes`.
    """

    def __init__(self, name: str | Path, source: str, config: Any, answers: Sequence[str] | None) -> None:
        if answers is not None and tuple(answers) != NO_YES:
            raise DistillError(
                f"blip ({name}) says whether image and text match, {', '.join(NO_YES)}, and cannot choose among "
                f"{len(answers)} other answers; take task itm or retrieval, or a {QUESTIONS} such as {EXAMPLE!r}"
            )
        fields = {"logits", "pooled", "similarity", "image_embedding", "text_embedding"}
        super().__init__(name, source, config, architecture=MATCHING, fields=fields)
        self.answers = NO_YES

    def _head(self, image: Tensor, text: Tensor, inputs: Mapping[str, Tensor], request: Request) -> dict[str, Any]:
        model = self._parts.model
        found: dict[str, Any] = {}
        if "pooled" in request.fields:
            found["pooled"] = text[:, 0].clone()
        if "logits" in request.fields:
            found["logits"] = model.itm_head(text[:, 0])
        if request.fields & {"similarity", "image_embedding", "text_embedding"}:
            alone = self._read(None, inputs).last_hidden_state
            vectors = {
                "image_embedding": normalize(model.vision_proj(image[:, 0]), dim=-1),
                "text_embedding": normalize(model.text_proj(alone[:, 0]), dim=-1),
            }
            found |= {field: vector for field, vector in vectors.items() if field in request.fields}
            if "similarity" in request.fields:
                rows = [self._match(picture, inputs) for picture in image]
                found["similarity"] = torch.stack(rows) + vectors["image_embedding"] @ vectors["text_embedding"].T
        return found

    def _match(self, picture: Tensor, inputs: Mapping[str, Tensor]) -> Tensor:
        """Return the match logits `[b]` of one picture `[n_image, d]` with every text."""
        image = picture.expand(len(inputs["input_ids"]), *picture.shape)
        logits: Tensor = self._parts.model.itm_head(self._read(image, inputs).last_hidden_state[:, 0])
        return logits[:, 1]


def load_blip(name: str | Path, *, answers: Sequence[str] | None = None) -> BlipTeacher:
    """Load a BLIP with the head that it was saved with.

    Args:
        name: a hub name such as `Salesforce/blip-vqa-base`, or a folder with model, tokenizer and image processor.
        answers: the vocabulary that a model for question answering scores.

    Raises:
        DistillError: if anything cannot be loaded, or the model has neither head.
    """
    source, config = load_config(name, model_type="blip", example=EXAMPLE)
    heads: dict[str, type[BlipAnswerer | BlipMatcher]] = {QUESTIONS: BlipAnswerer, MATCHING: BlipMatcher}
    saved = config.architectures or ["no class that it names"]
    if saved[0] not in heads:
        raise DistillError(f"{str(name)!r} was saved as {saved[0]}; a blip teacher is one of {', '.join(heads)}")
    return heads[saved[0]](name, source, config, answers)


def _keep_mask(module: Any, arguments: tuple[Any, ...], settings: dict[str, Any]) -> tuple[Any, dict[str, Any]]:
    """Give `BlipTextSelfAttention` the cross-attention's mask under the name that it reads."""
    if settings.get("encoder_attention_mask") is None:
        settings = {**settings, "encoder_attention_mask": settings["attention_mask"]}
    return arguments, settings
