"""What runs and registered models may be called: names that are safe in paths, keys, URLs and SQL as they stand."""

import re

from cluster.errors import ConfigError

NAME = r"^[a-z0-9][a-z0-9._-]{0,62}$"
"""Nor may there be `..` in it."""


def check_model_name(name: str) -> str:
    """The name itself.

    Raises:
        ConfigError: a registered model cannot be called so.
    """
    if not re.fullmatch(NAME, name) or name.endswith("\n") or ".." in name:
        raise ConfigError(
            f"model name {name!r}: use up to 63 small letters, digits, '.', '_' and '-', beginning with a letter or a "
            "digit, without '/' and '..'"
        )
    return name
