"""mmengine's messages, with names that may hold any character."""

import logging

from mmengine import logging as of_mmengine

from classification.errors import printable


def print_log(message: str, logger: str | None = None, level: int = logging.INFO) -> None:
    """Log one line by `mmengine.logging.print_log`, with unprintable characters escaped."""
    of_mmengine.print_log(printable(message), logger, level)
