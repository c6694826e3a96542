"""The registry's view of a model: its versions with their tags, and the aliases that lead to them.

MLflow's aliases and tags are last-writer-wins, so nothing is decided by them: `cluster.champions` decides, and what
stands here is what people and other programs see.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import Any

from cluster.errors import ModelError, RegistryFailed
from cluster.tracking import registry_client, set_alias

CHAMPION = "champion"
CHALLENGER = "challenger"


@dataclass(frozen=True)
class RegisteredVersion:
    """One version of a registered model, as MLflow has it."""

    version: str
    source: str
    run_id: str | None
    registered_at: str
    tags: dict[str, str]
    aliases: list[str]

    @property
    def artefact(self) -> dict[str, str]:
        """What a promotion is given.

        Raises:
            ModelError: it was not registered by raystill.
        """
        if "manifest_sha256" not in self.tags:
            raise ModelError(f"version {self.version}: it has no tag manifest_sha256; use one that raystill registered")
        return {"version": self.version, "uri": self.source, "manifest_sha256": self.tags["manifest_sha256"]}


def list_versions(uri: str, model_name: str) -> list[RegisteredVersion]:
    """All versions of a model, the first first; empty if there is no such model.

    Raises:
        RegistryFailed: the registry does not answer.
    """
    with registry_client(uri, f"the versions of {model_name} were not read") as client:
        found: list[Any] = []
        token: str | None = None
        while True:
            page = client.search_model_versions(f"name='{model_name}'", max_results=1000, page_token=token)
            found += page
            token = page.token
            if not token:
                break
        aliases = client.get_registered_model(model_name).aliases if found else {}
    return sorted((_version(item, aliases) for item in found), key=lambda item: int(item.version))


def find_version(uri: str, model_name: str, version: str) -> RegisteredVersion:
    """One version.

    Raises:
        ModelError: there is none of this number; the message names those that there are.
        RegistryFailed: the registry does not answer.
    """
    there = list_versions(uri, model_name)
    for item in there:
        if item.version == str(version):
            return item
    if not there:
        raise ModelError(
            f"model {model_name}: asked for version {version}, the registry has none; `raystill register` first"
        )
    numbers = ", ".join(item.version for item in there[-10:])
    raise ModelError(f"model {model_name}: asked for version {version}, the registry has {numbers}; choose one of them")


def tag_version(uri: str, model_name: str, version: str, tags: Mapping[str, str]) -> None:
    """Sets tags of a version. Raises `RegistryFailed` if the registry does not take them."""
    with registry_client(uri, f"version {version} of {model_name} was not tagged") as client:
        for name, value in tags.items():
            client.set_model_version_tag(model_name, version, name, value[:_LONGEST_TAG])


_LONGEST_TAG = 100_000


def point_champion(uri: str, model_name: str, version: str, manifest_sha256: str) -> None:
    """Makes the alias `champion` lead to a version, if it does not do so already.

    Raises:
        RegistryFailed: the registry does not answer, has no such version, or another one under this number.
    """
    what = f"alias {CHAMPION} of {model_name} was not set"
    with registry_client(uri, what) as client:
        found = client.get_model_version(model_name, version).tags.get("manifest_sha256")
        if found not in (None, manifest_sha256):
            raise RegistryFailed(
                f"{what}: version {version} has manifest {found[:12]}… there, the champion {manifest_sha256[:12]}…; "
                "register the champion's files again and promote that version"
            )
        if str(client.get_registered_model(model_name).aliases.get(CHAMPION)) != str(version):
            set_alias(uri, model_name, CHAMPION, version)


def point_challenger(uri: str, model_name: str, version: str | None) -> None:
    """Makes the alias `challenger` lead to a version, or to none.

    Raises:
        RegistryFailed: the registry does not answer, or has no such version.
    """
    with registry_client(uri, f"alias {CHALLENGER} of {model_name} was not set") as client:
        found = client.get_registered_model(model_name).aliases.get(CHALLENGER)
        if version is None and found is not None:
            client.delete_registered_model_alias(model_name, CHALLENGER)
        elif version is not None and str(found) != str(version):
            set_alias(uri, model_name, CHALLENGER, version)


def _version(item: Any, aliases: Mapping[str, Any]) -> RegisteredVersion:
    created = datetime.fromtimestamp(item.creation_timestamp / 1000, UTC)
    return RegisteredVersion(
        version=str(item.version),
        source=str(item.source),
        run_id=item.run_id or None,
        registered_at=created.isoformat(timespec="seconds"),
        tags={str(name): str(value) for name, value in item.tags.items()},
        aliases=sorted(name for name, version in aliases.items() if str(version) == str(item.version)),
    )
