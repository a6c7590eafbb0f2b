"""What the command line shows: progress bars and tables, on standard error and standard output."""

import sys
from collections.abc import Callable, Sequence

from tqdm import tqdm

NUMBER_STARTS = set("0123456789+-<") | {""}


class Console:
    """Progress and tables of one command.

    Args:
        quiet: show no progress bars.
    """

    def __init__(self, quiet: bool = False) -> None:
        self.quiet = quiet

    def bar(self, title: str) -> Callable[[int, int], None]:
        """Return a progress function `(done, total)`; when the count falls, a new series has begun."""
        bar: tqdm | None = None

        def show(done: int, total: int) -> None:
            nonlocal bar
            if bar is None or done <= bar.n:
                bar = _tqdm(title, total, self.quiet)
            bar.update(done - bar.n)
            if done >= total:
                bar.close()
                bar = None

        return show

    def steps(self, title: str) -> Callable[[int, int, float | None], None]:
        """Return a progress function `(step, steps, loss)` for training."""
        bar: tqdm | None = None

        def show(step: int, steps: int, loss: float | None) -> None:
            nonlocal bar
            bar = bar if bar is not None else _tqdm(title, steps, self.quiet, initial=step - 1)
            if loss is not None:
                bar.set_postfix_str(f"loss {loss:.3f}", refresh=False)
            bar.update(step - bar.n)
            if step >= steps:
                bar.close()

        return show

    def say(self, text: str = "") -> None:
        """Print a line of results."""
        print(text)

    def table(self, title: str, header: Sequence[str], rows: Sequence[Sequence[str]]) -> None:
        """Print a table: columns of numbers to the right, others to the left."""
        numbers = [all(row[i][:1] in NUMBER_STARTS for row in rows) for i in range(len(header))]
        widths = [max(len(row[i]) for row in [header, *rows]) for i in range(len(header))]

        def line(row: Sequence[str]) -> str:
            columns = zip(row, widths, numbers, strict=True)
            return "  ".join(c.rjust(width) if number else c.ljust(width) for c, width, number in columns).rstrip()

        self.say()
        self.say(title)
        self.say(line(header))
        self.say("  ".join("-" * width for width in widths))
        for row in rows:
            self.say(line(row))


def _tqdm(title: str, total: int, quiet: bool, initial: int = 0) -> "tqdm":
    # Where nobody watches (a pipe, a log), one line every ten seconds instead of ten a second.
    interval = 0.2 if sys.stderr.isatty() else 10.0
    return tqdm(desc=title, total=total, initial=initial, disable=quiet, mininterval=interval, leave=True, ncols=100)
