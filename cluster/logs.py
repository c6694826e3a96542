"""One log format for driver, workers and replicas: time, level, logger, message; standard error only."""

import logging
import os
import sys

_FORMAT = "%(asctime)s %(levelname)s %(name)s: %(message)s"


def setup_logging(level: str | None = None) -> None:
    """Call once per process. `RAYSTILL_LOG` sets the level (default WARNING in commands, INFO in workers)."""
    level = os.environ.get("RAYSTILL_LOG", level or "WARNING").upper()
    for name in ("cluster", "services", "jobs"):
        logger = logging.getLogger(name)
        logger.setLevel(level)
        if not logger.handlers:
            handler = logging.StreamHandler(sys.stderr)
            handler.setFormatter(logging.Formatter(_FORMAT, datefmt="%H:%M:%S"))
            logger.addHandler(handler)
            logger.propagate = False
