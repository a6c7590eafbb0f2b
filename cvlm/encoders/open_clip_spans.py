"""Character spans for the CLIP tokenizer, which cleans its text and tells no positions."""

from difflib import SequenceMatcher
from typing import Any

from cvlm.encoders.text_tokens import Span


def encode_with_spans(tokenizer: Any, text: str) -> tuple[list[int], list[Span]]:
    """Encode a text as `tokenizer.encode` does, and say where each token stands in the original string.

    Args:
        tokenizer: open_clip's `SimpleTokenizer`.
        text: as the user wrote it; the tokenizer repairs its encoding, unescapes HTML, joins white space and lowers
            case. Characters that cleaning rewrote get the span of the stretch they replace.

    Returns:
        Token ids without start and end, and one span per token.
    """
    cleaned = tokenizer.clean_fn(text)
    origin = _origins(text, cleaned)
    ids: list[int] = []
    spans: list[Span] = []
    for word in tokenizer.pat.finditer(cleaned):
        data = word.group().encode("utf-8")
        # The vocabulary is made of bytes: byte_of[k] is the character of the cleaned text that byte k belongs to.
        byte_of = [
            word.start() + index
            for index, character in enumerate(word.group())
            for _ in range(len(character.encode("utf-8")))
        ]
        position = 0
        for piece in tokenizer.bpe("".join(tokenizer.byte_encoder[byte] for byte in data)).split(" "):
            ids.append(tokenizer.encoder[piece])
            size = len(piece.removesuffix("</w>"))
            covered = [origin[index] for index in byte_of[position : position + size]]
            spans.append((min(start for start, _ in covered), max(end for _, end in covered)))
            position += size
    return ids, spans


def _origins(text: str, cleaned: str) -> list[Span]:
    """Return for each character of the cleaned text the span of the original that it comes from."""
    lowered: list[str] = []
    origin: list[Span] = []
    for index, character in enumerate(text):
        if character.isspace():
            # A run of white space becomes one blank, none at the beginning.
            if lowered and lowered[-1] != " ":
                lowered.append(" ")
                origin.append((index, index))
            continue
        for part in character.lower():
            lowered.append(part)
            origin.append((index, index + 1))
    if "".join(lowered).rstrip() == cleaned:
        return origin[: len(cleaned)]
    return _matched(text, cleaned)


def _matched(text: str, cleaned: str) -> list[Span]:
    """Align a text with what more than lowering and white space has changed."""
    # lower() may lengthen a text; positions count only while it does not.
    lowered = "".join(low if len(low := character.lower()) == 1 else character for character in text)
    origin: list[Span] = []
    for tag, start, end, first, last in SequenceMatcher(None, lowered, cleaned, autojunk=False).get_opcodes():
        if tag == "equal":
            origin.extend((start + offset, start + offset + 1) for offset in range(last - first))
        else:
            # What was inserted belongs to the character before it.
            origin.extend((start if start < end else max(start - 1, 0), end) for _ in range(last - first))
    return origin
