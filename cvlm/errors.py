"""The one exception type that a user is meant to read."""

from collections.abc import Iterable, Sequence
from difflib import get_close_matches


class CvlmError(Exception):
    """A mistake in what the user gave. The command line prints the text alone and exits with code 2.

    The text holds the value, the reason, and what to do next.
    """


def listed(problems: Sequence[str], most: int = 5) -> str:
    """Return the first problems, each on a line of its own, and how many more there are."""
    more = [f"and {len(problems) - most} more"] if len(problems) > most else []
    return "".join(f"\n  - {line}" for line in [*problems[:most], *more])


def nearest(name: str, known: Iterable[str]) -> str:
    """Return `` (did you mean 'x'?)`` for the nearest known name, or an empty string."""
    close = get_close_matches(name, list(known), n=1, cutoff=0.5)
    return f" (did you mean {close[0]!r}?)" if close else ""


def unknown_name(what: str, name: str, known: Iterable[str]) -> CvlmError:
    """Build the error for a name that is in no table, with the nearest valid name and the whole list."""
    names = sorted(known)
    return CvlmError(f"unknown {what} {name!r}{nearest(name, names)}. Known: {', '.join(names)}.")
