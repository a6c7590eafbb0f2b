"""The error that distillation raises for what a user can repair."""


class DistillError(ValueError):
    """A setting, a teacher or a pair of signals that cannot work together; the text says what to change."""
