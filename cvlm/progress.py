"""How long work tells how far it is."""

from collections.abc import Callable

Progress = Callable[[int, int], None]
"""Called with (done, total), both counted in the work's own unit; a count that falls begins a new series."""
