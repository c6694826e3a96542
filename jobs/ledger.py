"""What a run has done: one small record per stage below `stages/`, and `summary.json` at the storage root.

A record holds the stage's key, which is a hash of everything that decides its result. A stage whose record has the
same key is done; any other is to do. So a finished run says so, a killed one goes on where it was, and a changed
config repeats only what the change touches.
"""

from dataclasses import dataclass
from typing import Any, Literal

from cluster.config import fingerprint
from cluster.errors import CorruptArtifact, StorageError
from cluster.storage import Storage

SUMMARY = "summary.json"
STAGES = ("prepare", "teacher", "label", "train", "evaluate", "quantize", "register", "promote", "serve")
"""All stages in the order in which they run."""

Status = Literal["done", "failed", "skipped", "started", "interrupted"]


@dataclass(frozen=True)
class StageRecord:
    """How a stage ended."""

    key: str
    status: Status
    seconds: float
    output: dict[str, Any]
    message: str = ""


class Ledger:
    def __init__(self, storage: Storage, name: str) -> None:
        self._storage, self._name = storage, name

    def check_owner(self) -> None:
        """Raises `StorageError` if the storage root belongs to a run of another name, or is not a run's at all."""
        try:
            summary = self._storage.read_json(SUMMARY)
        except FileNotFoundError:
            return
        except CorruptArtifact as error:
            raise StorageError(str(error)) from error
        owner = summary.get("name") if isinstance(summary, dict) else None
        if owner is None:
            raise StorageError(
                f"storage {self._storage.uri}: its {SUMMARY} was not written by raystill: choose another storage"
            )
        if owner != self._name:
            raise StorageError(
                f"storage {self._storage.uri} holds run {owner!r}, the config says name={self._name!r}: "
                "choose another storage, or use that name"
            )

    def record(self, stage: str) -> StageRecord | None:
        """How the stage ended last, or None if it never did. A record of another version of raystill counts as none."""
        try:
            values = self._storage.read_json(f"stages/{stage}.json")
        except FileNotFoundError:
            return None
        try:
            return StageRecord(**{**values, "output": self._absolute(values["output"])})
        except (TypeError, KeyError):
            return None

    def done(self, stage: str, key: str) -> StageRecord | None:
        """The stage's record if it is done for this key."""
        record = self.record(stage)
        return record if record is not None and record.key == key and record.status in ("done", "skipped") else None

    def forget_after(self, stage: str) -> None:
        """Drops the records of later stages: they were made from what this stage is about to make anew."""
        later = [name for name in STAGES[STAGES.index(stage) + 1 :] if self.record(name) is not None]
        for name in later:
            self._storage.delete(f"stages/{name}.json")
        if later:
            self._storage.write_json(SUMMARY, self.summary())

    def write(self, stage: str, record: StageRecord) -> None:
        values = {**vars(record), "output": self._relative(record.output)}
        self._storage.write_json(f"stages/{stage}.json", values)
        self._storage.write_json(SUMMARY, self.summary())

    def summary(self) -> dict[str, Any]:
        """All stages, with training's figures, and the models' table: what `--json` prints."""
        records = {stage: record for stage in STAGES if (record := self.record(stage)) is not None}
        stages: dict[str, Any] = {}
        models: dict[str, Any] = {}
        for stage, record in records.items():
            entry: dict[str, Any] = {"status": record.status, "seconds": round(record.seconds, 2)}
            if record.message:
                entry["message"] = record.message
            output = dict(record.output)
            models.update(output.pop("models", {}))
            output.pop("details", None)  # for the report
            stages[stage] = {**entry, **output}
        return {"name": self._name, "storage": self._storage.uri, "stages": stages, "models": models}

    def _relative(self, value: Any) -> Any:
        """URIs below the storage root without it, so that a run can be moved."""
        return _replaced(value, f"{self._storage.uri}/", _ROOT)

    def _absolute(self, value: Any) -> Any:
        return _replaced(value, _ROOT, f"{self._storage.uri}/")


_ROOT = "run:///"


def _replaced(value: Any, old: str, new: str) -> Any:
    if isinstance(value, str):
        return new + value.removeprefix(old) if value.startswith(old) else value
    if isinstance(value, dict):
        return {name: _replaced(item, old, new) for name, item in value.items()}
    return [_replaced(item, old, new) for item in value] if isinstance(value, list) else value


def stage_key(*parts: Any) -> str:
    """The key of a stage made from the parts that decide its result."""
    return fingerprint(list(parts))
