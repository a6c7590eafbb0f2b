"""A text encoder with an answer head: what a CVLM is without pictures."""

from typing import cast

from torch import Tensor, nn

from cvlm.config import StudentSpec
from cvlm.encoders import EncoderOutput
from cvlm.errors import CvlmError
from cvlm.model.cvlm import ANSWER, CVLM, Inputs, check_encoders, checked_answers, match_dtype
from cvlm.model.heads import AnswerHead, masked_mean
from cvlm.tasks import TASKS
from distill.layout import TextLayout
from distill.signal import Request, Signal


class TextClassifier(CVLM):
    """A text encoder and an answer head, for tasks without pictures; trained, stored and run like any CVLM.

    It has no vision encoder and no fusion module. The head reads the mean of the text's tokens.

    Args:
        spec: what the model was composed of; `vision` is None.
        task: a key of `TASKS` whose examples show no picture.
        text: a text `Encoder`.
        answers: the classes.

    Raises:
        CvlmError: the task shows pictures, there are not at least two different answers, or the encoder lacks part of
            the protocol.
    """

    def __init__(self, spec: StudentSpec, *, task: str, text: nn.Module, answers: tuple[str, ...] = ()) -> None:
        nn.Module.__init__(self)  # CVLM's own would build what is missing here
        self.answers = checked_answers(task, tuple(answers))
        check_encoders(text=text)
        if TASKS[task].pictures:
            raise CvlmError(f"task {task!r} shows pictures, so its models need a vision encoder")
        self.spec, self.task, self.facts = spec, task, TASKS[task]
        self.text = text
        self.answer_head = AnswerHead(cast(int, text.width), len(self.answers))
        self.embedding_head = self.matching_head = self.decoder = None

    @property
    def towers(self) -> dict[str, nn.Module]:
        """The text encoder by name."""
        return {"text": self.text}

    @property
    def depth(self) -> int:
        """One layer of states: what the encoder puts out."""
        return 1

    @property
    def shared_parameters(self) -> list[nn.Parameter]:
        """The trained parameters of the encoder's last layer; where the encoder is frozen, those of the head."""
        trained = {name: parameter for name, parameter in self.text.named_parameters() if parameter.requires_grad}
        if not trained:
            return list(cast(AnswerHead, self.answer_head).parameters())
        return [trained[name] for name in self.text.layers()[-1] if name in trained]  # type: ignore[operator]

    @property
    def fields(self) -> frozenset[str]:
        """Signal fields that this model can give."""
        return frozenset({"logits", "pooled", "hidden", "text_layout"})

    def encode_text(self, text: Inputs) -> EncoderOutput:
        """Run the text encoder on prepared texts; stored encoder outputs pass through."""
        encoded = text if isinstance(text, EncoderOutput) else self.text(**text)
        return match_dtype(encoded, cast(AnswerHead, self.answer_head))

    def forward(
        self, image: Inputs | None, text: Inputs, *, request: Request = ANSWER, labels: Tensor | None = None
    ) -> Signal:
        """Classify `b` texts.

        Args:
            image: None; the place that a CVLM's pictures have.
            text: what `text.prepare` gave, or stored encoder outputs.
            request: what to record; layer 0 of `hidden` holds the encoder's tokens.
            labels: without effect.

        Raises:
            ValueError: pictures were given.
        """
        if image is not None:
            raise ValueError(f"task {self.task!r} shows no pictures, and got some")
        encoded = self.encode_text(text)
        pooled = masked_mean(encoded.tokens, encoded.mask)
        assert self.answer_head is not None
        return Signal(
            logits=self.answer_head(pooled),
            pooled=pooled if "pooled" in request.fields else None,
            hidden={0: encoded.tokens} if 0 in request.hidden_layers else None,
            text_layout=cast(TextLayout, encoded.layout),
        )
