"""The errors that callers may want to tell apart. Everything else is a plain `TypeError` or `ValueError`."""


class CheckpointError(ValueError, OSError):
    """A checkpoint is missing, incomplete, damaged or not what it says it is."""


class NotFiniteError(ArithmeticError):
    """A network gave NaN or infinity; the message names the component."""


class Cancelled(Exception):  # noqa: N818 - it is no fault, the caller asked for it
    """The run was cancelled by its caller."""
