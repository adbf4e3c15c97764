"""What lc3 has chosen by itself, where one can see it."""

import logging
import sys


def show_choices() -> None:
    """Print what lc3 chooses by itself, and why, to stderr from now on.

    These are the lines of level INFO of the logger ``lc3``. Where the root logger, or
    that one, has a handler, it gets them; else one is added.

    Example:
        >>> show_choices()
    """
    log = logging.getLogger("lc3")
    log.setLevel(logging.INFO)
    if not log.hasHandlers():
        log.addHandler(logging.StreamHandler(sys.stderr))
