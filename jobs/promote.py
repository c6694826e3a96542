"""The gate, and the crown: which registered version the endpoint serves.

The figures that the gate looks at were measured on the artefact after a reload in a fresh process. Who wins a race of
promotions is decided by a compare-and-set in SQL; MLflow's alias is set afterwards, as a copy.
"""

import logging
from typing import Any

from cluster.champions import Champion, crown, current_champion, open_database
from cluster.errors import CorruptArtifact, PromotionRefused
from cluster.published import check_directory
from cluster.tracking import set_alias
from jobs.config import PromoteConfig

logger = logging.getLogger(__name__)


def check_gate(config: PromoteConfig, student: dict[str, Any], candidate: dict[str, Any]) -> float:
    """The candidate's relative loss of quality against the float student.

    Raises:
        PromotionRefused: it is more than `promote.max_quality_loss`, or not a number.
    """
    loss = candidate["bits_per_byte"] / student["bits_per_byte"] - 1
    if not loss <= config.max_quality_loss:
        raise PromotionRefused(
            f"{config.scheme}: {candidate['bits_per_byte']:.4f} bits per byte against {student['bits_per_byte']:.4f} "
            f"of the float student is a loss of {loss:.2%}, promote.max_quality_loss allows "
            f"{config.max_quality_loss:.2%}: the champion stays; choose another promote.scheme or raise the limit"
        )
    return loss


def promote(
    config: PromoteConfig,
    model_name: str,
    version: dict[str, Any],
    student: dict[str, Any],
    candidate: dict[str, Any],
    database: str,
    tracking: str,
) -> Champion:
    """Makes a version champion if it passes the gate; repeating it changes nothing.

    Args:
        version: `{"version", "uri", "manifest_sha256"}` of the candidate.
        student, candidate: measures of the float student and of the candidate.

    Raises:
        PromotionRefused: the gate said no, the files are not those that were registered, or another promotion won.
    """
    check_gate(config, student, candidate)
    try:
        check_directory(version["uri"], version["manifest_sha256"])
    except CorruptArtifact as error:
        raise PromotionRefused(
            f"version {version['version']}: {error}; the champion stays. Delete {version['uri']} and run it again"
        ) from error
    engine = open_database(database)
    try:
        champion = current_champion(engine, model_name)
        if champion is None or champion.manifest_sha256 != version["manifest_sha256"]:
            champion = crown(
                engine, model_name, version["version"], version["uri"], version["manifest_sha256"], champion
            )
    finally:
        engine.dispose()
    try:
        set_alias(tracking, model_name, "champion", champion.version)
    except Exception as error:  # the row decides; the next promotion or run repairs the copy
        logger.warning(
            "alias champion of %s was not set (%s); the endpoint serves the version all the same", model_name, error
        )
    return champion
