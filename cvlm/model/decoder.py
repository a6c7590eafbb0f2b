"""What makes a fusion module a captioner: the words that it reads and says, and the search for a whole caption."""

from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from cvlm.encoders import EncoderOutput, fingerprint
from cvlm.tasks import END, LONGEST_CAPTION, START, UNKNOWN
from distill.signal import Request
from fusion import Fusion, FusionOutput

if TYPE_CHECKING:
    from cvlm.model.cvlm import Projected

PADDING = -100
"""Stands behind a caption's last word, as where a label is unknown."""

BEAM = 3
"""Width of the beam search, as usual for captions on COCO."""

_READ: dict[tuple[str, tuple[str, ...]], Tensor] = {}
"""What the last text encoder said of the last vocabulary: all arms and seeds of a run share both."""

Step = Callable[[Tensor, Tensor], Tensor]
"""Turns prefixes `[n, t]` of words about the pictures `[n]` into the log-probabilities `[n, V]` of each next word."""


class WordDecoder(nn.Module):
    """Word embeddings and word logits of a causal fusion module. b pictures, T places, V words, d width.

    The pretrained text encoder enters here: it reads every word of the vocabulary once, and what it says of them
    stands in `features`. A word's embedding is the projection of that plus a learned vector of its own, without which
    words that the encoder's tokenizer does not know would stay one. The words that the decoder reads and those that it
    chooses among have the same embeddings (Press & Wolf 2017).

    Args:
        words: V.
        text_width: width of the text encoder.
        width: d.
    """

    features: Tensor

    def __init__(self, words: int, text_width: int, width: int) -> None:
        super().__init__()
        self.register_buffer("features", torch.zeros(words, text_width))
        self.own = nn.Parameter(0.02 * torch.randn(words, width))
        self.positions = nn.Parameter(0.02 * torch.randn(LONGEST_CAPTION, width))
        self.bias = nn.Parameter(torch.zeros(words))

    def read_vocabulary(self, encoder: nn.Module, words: tuple[str, ...]) -> None:
        """Let a frozen text encoder read the vocabulary, word by word; once per process, however many models ask."""
        key = (fingerprint(encoder), words)
        if key not in _READ:
            _READ.clear()
            _READ[key] = _word_features(encoder, words)
        self.features.copy_(_READ[key])

    def forward(
        self, fusion: Fusion, image: "Projected", words: Tensor, request: Request
    ) -> tuple[Tensor, FusionOutput]:
        """Predict every word of captions from the picture and the words before it (teacher forcing).

        Args:
            fusion: of kind `cross`.
            image: the pictures.
            words: `[b, T]`, `PADDING` behind the last word.
            request: what the fusion module records.

        Returns:
            Logits `[b, T, V]`, and what the fusion module gave.
        """
        # A place is read where a word is to be predicted; what is read behind the last word is of no account.
        before = F.pad(words[:, :-1].clamp_min(0), (1, 0), value=START)
        table = self._table(fusion)
        fused = self._fuse(fusion, image, table[before], words != PADDING, request)
        return self._logits(fused.text, table), fused

    def generate(self, fusion: Fusion, image: "Projected", *, beam: int, longest: int = LONGEST_CAPTION) -> Tensor:
        """Write captions, see `beam_search`; prefixes are short and are run again for every word.

        Returns:
            `[b, longest]`, the sign for the end included, `PADDING` behind it.
        """
        table = self._table(fusion)

        def step(prefix: Tensor, picture: Tensor) -> Tensor:
            shown = replace(image, tokens=image.tokens[picture], mask=image.mask[picture])
            fused = self._fuse(fusion, shown, table[prefix], torch.ones_like(prefix, dtype=torch.bool), Request())
            return self._logits(fused.text[:, -1], table).log_softmax(-1)

        return beam_search(step, len(image.tokens), beam=beam, longest=longest, device=image.tokens.device)

    def _table(self, fusion: Fusion) -> Tensor:
        return fusion.text_projection(self.features.to(self.bias.dtype)) + self.own

    def _logits(self, states: Tensor, table: Tensor) -> Tensor:
        return states @ table.T * table.shape[-1] ** -0.5 + self.bias

    def _fuse(self, fusion: Fusion, image: "Projected", words: Tensor, keep: Tensor, request: Request) -> FusionOutput:
        assert image.layout is not None, "pictures have a grid"
        return fusion.fuse(
            words + self.positions[: words.shape[1]],
            image.tokens,
            text_keep=keep,
            image_keep=image.mask,
            image_grid=image.layout.grid,
            image_special=image.layout.special,
            causal=True,
            attention_layers=request.attention_layers,
            hidden_layers=request.hidden_layers,
        )


def _word_features(encoder: nn.Module, words: Sequence[str], batch_size: int = 256) -> Tensor:
    """Return what an encoder says of each word `[V, text width]`."""
    prepare: Any = encoder.prepare
    # Words of one length together: padding is work too.
    order = sorted(range(len(words)), key=lambda place: len(words[place]))
    rows: list[Tensor] = [torch.empty(0)] * len(words)
    with torch.inference_mode():
        for start in range(0, len(words), batch_size):
            batch = order[start : start + batch_size]
            out: EncoderOutput = encoder.eval()(**prepare([words[place] for place in batch]))
            for place, row in zip(batch, out.pooled.float(), strict=True):
                rows[place] = row
    return torch.stack(rows)


def beam_search(step: Step, batch: int, *, beam: int, longest: int, device: torch.device) -> Tensor:
    """Search for the caption with the highest mean log-probability of its words, the sign for the end included.

    Captions that have ended stay in the beam and compete with those that go on. With `beam` 1 this is greedy search.
    The unknown word and the sign for the start are never said, and a caption has at least one word.

    Args:
        step: the model; it is asked about captions that have not ended, and about all at once.
        batch: b.
        beam: how many captions per picture are followed.
        longest: places of a caption, the end included; one that has not ended by then is cut.
        device: where the model runs.

    Returns:
        `[b, longest]`, `PADDING` behind the end.
    """
    words = torch.full((batch, beam, 1), START, device=device)
    # All beams of a picture begin alike: the first one speaks for them.
    total = torch.zeros(batch, beam, device=device).masked_fill(torch.arange(beam, device=device) > 0, -torch.inf)
    length, ended = torch.zeros_like(total), torch.zeros_like(total, dtype=torch.bool)
    for place in range(longest):
        picture, entry = (~ended).nonzero(as_tuple=True)
        said = step(words[picture, entry], picture).float()
        log_p = said.new_zeros(batch, beam, said.shape[-1])
        log_p[picture, entry] = said
        log_p[..., [UNKNOWN, START] if place else [UNKNOWN, START, END]] = -torch.inf
        stay = torch.full_like(log_p, -torch.inf)
        stay[..., END] = 0
        scores = total[..., None] + torch.where(ended[..., None], stay, log_p)
        length = length + ~ended
        best = (scores / length[..., None]).flatten(1).topk(beam).indices
        parent, word = best // log_p.shape[-1], best % log_p.shape[-1]
        total, length, ended = scores.flatten(1).gather(1, best), length.gather(1, parent), ended.gather(1, parent)
        word = word.masked_fill(ended, PADDING)
        words = torch.cat([words.gather(1, parent[..., None].expand_as(words)), word[..., None]], dim=-1)
        ended = ended | (word == END)
        if ended.all():
            break
    winner = (total / length).argmax(1)
    found = words[torch.arange(batch, device=device), winner, 1:]
    return F.pad(found, (0, longest - found.shape[1]), value=PADDING)
