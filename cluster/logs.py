"""One log format for driver, workers and replicas: time, level, logger, message; standard error only."""

import logging
import os
import sys

_FORMAT = "%(asctime)s %(levelname)s %(name)s: %(message)s"


def setup_logging(level: str | None = None) -> None:
    """Call once per process. `RAYSTILL_LOG` sets the level (default WARNING in commands, INFO in workers)."""
    default = level or "WARNING"
    wanted = os.environ.get("RAYSTILL_LOG", "").upper() or default
    known = logging.getLevelNamesMapping()
    level = wanted if wanted in known else default
    for name in ("cluster", "services", "jobs"):
        logger = logging.getLogger(name)
        logger.setLevel(level)
        if not logger.handlers:
            handler = logging.StreamHandler(sys.stderr)
            handler.setFormatter(logging.Formatter(_FORMAT, datefmt="%H:%M:%S"))
            logger.addHandler(handler)
            logger.propagate = False
    if wanted not in known:
        logging.getLogger(__name__).warning(
            "RAYSTILL_LOG=%s is no level; it stays at %s. Known: DEBUG, INFO, WARNING, ERROR", wanted, default
        )
