"""Any image-text-to-text model of transformers (Qwen-VL, LLaVA, SmolVLM, ...) as a teacher.

It scores every answer of a vocabulary (gray-box), or writes answers (black-box).
"""

import copy
import inspect
from collections.abc import Mapping, Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Any, Literal

import torch
from PIL.Image import Image
from torch import Tensor

from distill.errors import DistillError
from distill.signal import Request, Signal
from distill.teachers.answer_scores import AnswerTokens, answer_tokens, log_likelihood
from distill.teachers.answering import PROMPT, Answer, check_prompt, check_sampling, fill_prompt
from distill.teachers.base import check_pairs
from distill.teachers.transformers_common import SIGNAL_VERSION, attempt, fingerprint_of, load_model, read_config

EXAMPLE = "HuggingFaceTB/SmolVLM-256M-Instruct"


class GenerativeTeacher:
    """A frozen generative vision-language model.

    `mode: score` gives `logits`: the mean log-probability of an answer's tokens and of the token that ends it, given
    picture and prompt. The mean over tokens (length normalisation, as in GPT-3, Brown et al. 2020, section 2.4) keeps
    long answers in the race; the end token keeps `red` apart from the beginning of `red car`. Picture and prompt run
    once; all answers go on from their keys and values. `mode: generate` gives `answers`.

    Weights keep the precision that they were saved in; scores are taken in single precision.

    Args:
        name: hub name or local folder.
        answers: the vocabulary that is scored; in `generate` only for `{answers}` in the prompt.
        mode: `score` or `generate`.
        prompt: template with `{question}`, perhaps with `{answers}`; None takes `PROMPT`. It becomes
            the user's turn of the model's chat template; a model without one reads the picture, then this text.
        max_tokens: longest written answer.

    Raises:
        DistillError: the model cannot be loaded or keeps no cache, or a setting does not fit.
    """

    depth = 0
    pictures = 1
    confident = True

    def __init__(
        self,
        name: str | Path,
        *,
        answers: Sequence[str] = (),
        mode: Literal["score", "generate"] = "score",
        prompt: str | None = None,
        max_tokens: int = 16,
    ) -> None:
        prompt = PROMPT if prompt is None else prompt
        check_prompt(prompt)
        if mode not in ("score", "generate"):
            raise DistillError(f"mode is {mode!r}; use score or generate")
        if mode == "score" and not answers:
            raise DistillError(f"generative teacher {name}: mode score needs the answers to score; give answers=[...]")
        self.name = f"generative ({name})"
        self.fields = frozenset({"logits"} if mode == "score" else {"answers"})
        self.answers = tuple(answers) if mode == "score" else None
        self._mode, self._prompt, self._vocabulary, self._max_tokens = mode, prompt, tuple(answers), max_tokens
        self._device = torch.device("cpu")
        self._model, self._processor = _load(name)
        self._tokenizer = getattr(self._processor, "tokenizer", self._processor)
        if self._tokenizer.eos_token_id is None:
            raise DistillError(f"the tokenizer of {name} has no end token, which ends an answer; set its eos_token")
        self._chat = bool(getattr(self._processor, "chat_template", None))
        if mode == "score":
            # Behind a chat template an answer begins a turn; behind plain text it follows a word.
            glue = "" if self._chat or prompt[-1].isspace() else " "
            written = [glue + answer for answer in answers]
            self._answer_tokens = answer_tokens(
                self._tokenizer, written, end=self._tokenizer.eos_token_id, name=self.name
            )
        self.fingerprint = self._fingerprint()

    def prepare(self, images: Sequence[Image], texts: Sequence[str]) -> dict[str, Any]:
        """Preprocess `b` pairs; returns `{"examples": [...]}`, each with the tensors of a batch of one.

        One by one, because padding would shift positions and pictures of unlike size give unlike numbers of tokens.

        Raises:
            DistillError: there are no pairs, or not as many pictures as texts.
        """
        check_pairs(self.name, images, texts)
        return {"examples": [self._inputs(image, text) for image, text in zip(images, texts, strict=True)]}

    def signal(self, inputs: Mapping[str, Any], request: Request) -> Signal:
        """Score or answer prepared pairs.

        Raises:
            DistillError: the request asks for a field that this mode does not give.
        """
        unknown = sorted(request.fields - self.fields)
        if unknown:
            raise DistillError(
                f"{self.name} in mode {self._mode} gives {', '.join(self.fields)}, not {', '.join(unknown)}; leave "
                "these out of the objectives, or take another mode or teacher"
            )
        if self._mode == "generate":
            found = self.answer(inputs, samples=1, temperature=0.0, seeds=range(len(inputs["examples"])))
            return Signal(answers=tuple(answers[0].text for answers in found))
        with torch.no_grad():
            return Signal(logits=torch.stack([self._score(example) for example in inputs["examples"]]))

    def answer(
        self, inputs: Mapping[str, Any], *, samples: int, temperature: float, seeds: Sequence[int]
    ) -> list[list[Answer]]:
        """Write answers; see `Answering`. Only the temperature shapes the drawing, no top-k or top-p of the model's."""
        check_sampling(samples, temperature)
        found = []
        for example, seed in zip(inputs["examples"], seeds, strict=True):
            with torch.random.fork_rng(), torch.no_grad():
                torch.manual_seed(seed)
                found.append(self._write(example, samples, temperature))
        return found

    def to(self, device: Any) -> "GenerativeTeacher":
        """Move the model."""
        self._model.to(device)
        self._device = torch.device(device)
        return self

    # --- one example --------------------------------------------------------------------------------------------

    def _inputs(self, image: Image, text: str) -> dict[str, Tensor]:
        prompt = fill_prompt(self._prompt, text, self._vocabulary)
        image = image.convert("RGB")
        if self._chat:
            content = [{"type": "image", "image": image}, {"type": "text", "text": prompt}]
            batch = self._processor.apply_chat_template(
                [{"role": "user", "content": content}],
                add_generation_prompt=True,
                tokenize=True,
                return_dict=True,
                return_tensors="pt",
            )
        else:
            place = getattr(self._processor, "image_token", "")
            batch = self._processor(images=[image], text=[f"{place}\n{prompt}".lstrip("\n")], return_tensors="pt")
        return {key: value for key, value in batch.items() if isinstance(value, Tensor)}

    def _score(self, example: Mapping[str, Tensor]) -> Tensor:
        """Return the scores of all answers `[n_answers]`."""
        moved = self._moved(example)
        # Nothing is padded on the left, so later passes need no mask; with one, some models number their tokens anew.
        last_only = (
            {"logits_to_keep": 1} if "logits_to_keep" in inspect.signature(self._model.forward).parameters else {}
        )
        prefix = self._model(**moved, use_cache=True, **last_only)
        if prefix.past_key_values is None:
            raise DistillError(f"{self.name} keeps no keys and values, so it cannot score answers; use mode: generate")
        chunks = self._answer_tokens.chunks(1, self._device)
        scores = [log_likelihood(self._go_on(prefix, chunk), chunk, mean=True)[0] for chunk in chunks]
        return torch.cat(scores)

    def _go_on(self, prefix: Any, answers: AnswerTokens) -> Tensor:
        """Return the scores `[1, a, n, words]` of the tokens at each place of some answers."""
        cache = copy.deepcopy(prefix.past_key_values)  # a pass writes into it
        cache.batch_repeat_interleave(len(answers))
        later = self._model(input_ids=answers.ids[:, :-1], past_key_values=cache, use_cache=True).logits
        first = prefix.logits[:, -1:].expand(len(answers), -1, -1)
        return torch.cat([first, later], dim=1)[None]

    def _write(self, example: Mapping[str, Tensor], samples: int, temperature: float) -> list[Answer]:
        drawing = {"do_sample": True, "temperature": temperature, "top_k": 0, "top_p": 1.0} if temperature else {}
        moved = self._moved(example)
        end = self._tokenizer.eos_token_id
        output = self._model.generate(
            **moved,
            max_new_tokens=self._max_tokens,
            num_return_sequences=samples,
            pad_token_id=end,
            return_dict_in_generate=True,
            output_logits=True,
            **({"do_sample": False, "num_beams": 1} | drawing),
        )
        written = output.sequences[:, moved["input_ids"].shape[1] :]
        # The model's own probabilities, before temperature.
        logs = torch.stack(output.logits, dim=1).float().log_softmax(-1).gather(-1, written[..., None])[..., 0]
        ended = (written == end).long().cumsum(-1)
        real = (ended == 0) | ((ended == 1) & (written == end))  # up to the first end token, itself included
        confidence = (logs.masked_fill(~real, 0.0)).sum(-1).exp().tolist()
        texts = self._tokenizer.batch_decode(written, skip_special_tokens=True)
        return [Answer(text=text.strip(), confidence=c) for text, c in zip(texts, confidence, strict=True)]

    def _moved(self, example: Mapping[str, Tensor]) -> dict[str, Tensor]:
        dtype = self._model.dtype
        return {
            key: value.to(self._device, dtype) if value.is_floating_point() else value.to(self._device)
            for key, value in example.items()
        }

    def _fingerprint(self) -> str:
        config = {key: value for key, value in self._model.config.to_dict().items() if key != "_name_or_path"}
        facts = {
            "signal": SIGNAL_VERSION,
            "config": config,
            "processor": self._processor.to_dict(),
            "template": getattr(self._processor, "chat_template", None),
            "vocabulary": sorted(self._tokenizer.get_vocab().items()),
            "settings": [self._mode, self._prompt, self._vocabulary, self._max_tokens],
            "libraries": {name: version(name) for name in ("torch", "transformers", "tokenizers", "pillow")},
        }
        return fingerprint_of(facts, self._model)


def _load(name: str | Path) -> tuple[Any, Any]:
    """Load a frozen model and its processor."""
    import transformers

    source, config = read_config(name, example=EXAMPLE)
    if getattr(config, "is_encoder_decoder", False):
        raise DistillError(
            f"{name} is an encoder-decoder ({config.model_type}); a generative teacher reads picture, question and "
            f"answer as one sequence, such as {EXAMPLE}"
        )
    architecture = transformers.AutoModelForImageTextToText
    model = load_model(source, architecture, attn_implementation=None, dtype="auto")
    return model, attempt(transformers.AutoProcessor.from_pretrained, source, what="processor")
