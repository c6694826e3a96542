"""From checked artefacts to versions of a registered model.

A version is a published directory with everything that identifies it in its manifest: the hash of every file, the
scheme and library versions, the run, the fingerprints of teacher and data, and what was measured. The registry entry
points at it and carries the figures as tags.
"""

import tempfile
from pathlib import Path
from typing import Any

from cluster.config import fingerprint
from cluster.published import check_version_files, fetch_directory, manifest_sha256, publish_directory, read_manifest
from cluster.storage import Storage, split_uri
from cluster.tracking import register_version


def register(
    artefacts: dict[str, dict[str, Any]],
    model_name: str,
    storage: Storage,
    tracking: str,
    run_id: str | None,
    facts: dict[str, Any],
) -> dict[str, dict[str, Any]]:
    """Publishes and registers every artefact; repeating it changes nothing.

    Args:
        artefacts: by scheme, `{"uri", "measured"}`.
        facts: what goes into every manifest: run, teacher and data fingerprints, the float student's quality.

    Returns:
        By scheme, `{"version", "uri", "manifest_sha256"}`.

    Raises:
        CorruptArtifact: an artefact is not what was published, or holds a file that no version has.
        RegistryFailed: the registry did not take a version.
    """
    out = {}
    for scheme, artefact in artefacts.items():
        parent, name = split_uri(artefact["uri"])
        with tempfile.TemporaryDirectory(prefix="raystill-register-") as local:
            made = fetch_directory(parent, name, Path(local))
            check_version_files(made["files"], artefact["uri"])
            known = {key: value for key, value in made.items() if key not in ("files", "sha256")}
            every = {**known, **facts, "model_name": model_name, "measured": artefact["measured"]}
            prefix = f"registry/{model_name}/{scheme}-{fingerprint([made['files'], every])}"
            manifest = read_manifest(storage, prefix) or publish_directory(Path(local), storage, prefix, **every)
        uri, digest = f"{storage.uri}/{prefix}", manifest_sha256(manifest)
        tags = {"scheme": scheme, "run": str(facts["run"]), **_figures(artefact["measured"])}
        version = register_version(tracking, model_name, uri, digest, run_id, tags)
        out[scheme] = {"version": version, "uri": uri, "manifest_sha256": digest}
    return out


def _figures(measured: dict[str, Any]) -> dict[str, str]:
    """Figures as tags: counts to the last digit, others to six."""
    numbers = {name: value for name, value in measured.items() if isinstance(value, (int, float))}
    return {name: str(value) if isinstance(value, int) else f"{value:.6g}" for name, value in numbers.items()}
