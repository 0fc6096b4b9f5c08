"""One line in Flower's log for an error that a user can act on, in the place of its traceback."""

import logging
import sys

from tofu.errors import TofuError


class OneLineErrors(logging.Filter):
    """Replaces tracebacks of `TofuError` by their messages, and drops the lines on the exit code that follow one.

    Flower logs what a `ServerApp` raises with its traceback, 30 lines above and below the message.
    """

    def __init__(self) -> None:
        super().__init__()
        self._seen = False

    def filter(self, record: logging.LogRecord) -> bool:
        """Return whether the record is logged, and shorten it."""
        error = record.exc_info[1] if record.exc_info else None
        if error is not None:
            self._seen = isinstance(error, TofuError)
        if isinstance(error, TofuError):
            record.msg, record.args, record.exc_info, record.exc_text = "%s", (f"error: {error}",), None, None
            return not error.shown
        text = record.getMessage()
        repeated = text.startswith("Traceback (") and isinstance(sys.exc_info()[1], TofuError)
        return not repeated and not (self._seen and text.startswith("Exit Code: "))


def show_errors_in_one_line() -> None:
    """Add the filter to Flower's logger, once."""
    logger = logging.getLogger("flwr")
    if not any(isinstance(known, OneLineErrors) for known in logger.filters):
        logger.addFilter(OneLineErrors())
