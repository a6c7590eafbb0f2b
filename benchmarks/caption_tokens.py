"""Captions as the tokens that caption metrics count: Penn Treebank tokens in lower case, without punctuation.

The official evaluation runs Stanford's PTBTokenizer, a Java program inside pycocoevalcap, and drops 18 punctuation
marks. `official_tokens` calls it. `simple_tokens` does the same to ordinary captions without Java: letters, digits,
commas, stops, quotes, hyphens, brackets, clitics (`dog's`, `isn't`, `can't`), initials (`u.s.`), a few titles.
"""

import re
import shutil
import subprocess
from collections.abc import Sequence
from pathlib import Path

from cvlm.errors import CvlmError

# Double quotes and dashes become `` and -- there. The official list has brackets in upper case, and tokens are in lower
# case: brackets stay.
DROPPED = frozenset(["''", "'", "``", "`", ".", "?", "!", ",", ":", "-", "--", "...", ";"])
QUOTES = frozenset(['"', "\u2018", "\u2019", "\u201c", "\u201d", "\u2013", "\u2014"])

BRACKETS = {"(": "-lrb-", ")": "-rrb-", "[": "-lsb-", "]": "-rsb-", "{": "-lcb-", "}": "-rcb-"}

_CONTRACTED = re.compile(r"\b(?:(can)(not)|(gon|wan)(na)|(got)(ta)|(gim|lem)(me))\b")
_CLITIC = r"(?:n['\u2019]t|['\u2019](?:s|m|d|re|ve|ll))(?!\w)"
_TOKEN = re.compile(
    rf"""
    \b(?:mr|mrs|ms|dr|prof|st|jr|sr|vs|etc)\.             # titles keep their stop,
    | \b(?:[a-z]\.)+                                      # and so do initials
    | (?:(?<!\S)[-+])?\d+(?:[.,:]\d+)*(?![\w-])           # -1 and 1,000 and 3.5 and 8:30
    | '\d\ds?(?!\w) | <\w+>                               # '90s
    | {_CLITIC} | \w+?(?={_CLITIC})                       # 's and n't, and what stands before one
    | \w+(?:(?:[-/&.]|(?<=o)'(?=clock)|\u2019)\w+)*       # words, also with hyphens inside
    | \.{{2,}} | -{{2,}} | \*+ | [?!]+                       # runs of a mark are one token
    | \S
    """,
    re.VERBOSE,
)


def simple_tokens(caption: str) -> str:
    """Return a caption's tokens with a space between them, as `official_tokens` does for ordinary captions."""
    text = _CONTRACTED.sub(lambda found: " ".join(filter(None, found.groups())), caption.lower())
    tokens = (BRACKETS.get(token, token) for token in _TOKEN.findall(text))
    kept = [token for token in tokens if token not in DROPPED | QUOTES]
    return " ".join(re.sub("^(n?)\u2019", r"\1'", token) for token in kept)


def has_java() -> bool:
    """Whether the official tokenizer (and METEOR) can run."""
    return shutil.which("java") is not None


def official_tokens(captions: Sequence[str]) -> list[str]:
    """Return each caption's tokens with a space between them, by Stanford's PTBTokenizer; needs Java.

    The program is called as `pycocoevalcap.tokenizer.ptbtokenizer` does, but through a pipe, and its text is UTF-8
    whatever the locale: the wrapper writes into its own package folder.

    Raises:
        CvlmError: The program failed.
    """
    from pycocoevalcap.tokenizer import ptbtokenizer

    jar = Path(ptbtokenizer.__file__).parent / ptbtokenizer.STANFORD_CORENLP_3_4_1_JAR
    command = ["java", "-cp", str(jar), "edu.stanford.nlp.process.PTBTokenizer", "-preserveLines", "-lowerCase"]
    # One caption per line: no white space but spaces may stand in one.
    lines = "".join(" ".join(caption.split()) + "\n" for caption in captions)
    done = subprocess.run([*command, "-encoding", "utf-8"], input=lines.encode(), capture_output=True, check=False)
    found = done.stdout.decode().split("\n")[:-1]
    if done.returncode or len(found) != len(captions):
        said = done.stderr.decode(errors="replace").strip()
        raise CvlmError(f"the PTBTokenizer gave {len(found)} lines for {len(captions)} captions: {said[-300:]}")
    return [" ".join(token for token in line.split(" ") if token not in DROPPED).strip() for line in found]
