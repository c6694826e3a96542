"""The teacher of a label store: known from what it left there, without its weights being anywhere near."""

import hashlib
import json
from concurrent.futures import Future
from dataclasses import asdict
from typing import Any

import numpy as np
from safetensors.numpy import load, save

from cluster.errors import CorruptArtifact, TeacherFailed
from cluster.storage import Storage
from jobs.labels.store import canonical, prefix_of
from services.teacher.client import ClientCounters
from services.teacher.schema import ScoreReply, ScoreRequest, TeacherDescription
from services.teacher.signals import HeadRecord, SignalSpec


class StoredTeacher:
    """Answers what a label store knows of its teacher; `submit` fails, since whoever asks has labels."""

    def __init__(self, storage: Storage, teacher: str, spec: SignalSpec) -> None:
        self.counters = ClientCounters()
        self._storage, self._prefix = storage, prefix_of(teacher, spec)
        self._facts = storage.read_json(f"{self._prefix}/_teacher.json")

    def describe(self) -> TeacherDescription:
        return TeacherDescription(**self._facts["description"])

    def head(self) -> HeadRecord:
        key = f"{self._prefix}/{self._facts['head']}"
        data = self._storage.read(key)
        if hashlib.sha256(data).hexdigest()[:32] not in key:
            raise CorruptArtifact(f"{self._storage.uri}/{key}: sha256 is not the one in its name; label again")
        arrays, facts = load(data), self._facts["head_facts"]
        return HeadRecord(self.describe().fingerprint, arrays["weight_VD"], arrays.get("bias_V"), **facts)

    def submit(self, request: ScoreRequest) -> "Future[ScoreReply]":
        answer: Future[ScoreReply] = Future()
        answer.set_exception(
            TeacherFailed(f"request {request.request_id}: no teacher was started, and no label is there")
        )
        return answer

    def close(self) -> None: ...


def store_teacher(storage: Storage, description: TeacherDescription, spec: SignalSpec, head: HeadRecord | None) -> None:
    """Writes what `StoredTeacher` needs; whoever writes it for a teacher writes the same."""
    prefix = prefix_of(description.fingerprint, spec)
    facts: dict[str, Any] = {"description": asdict(description), "signal": asdict(canonical(spec))}
    if head is not None:
        arrays = {"weight_VD": head.weight_VD} | ({} if head.bias_V is None else {"bias_V": head.bias_V})
        data = save({name: np.ascontiguousarray(array) for name, array in arrays.items()})
        facts["head"] = f"_head-{hashlib.sha256(data).hexdigest()[:32]}.safetensors"
        facts["head_facts"] = {"scale": head.scale, "soft_cap": head.soft_cap}
        if not storage.exists(f"{prefix}/{facts['head']}"):
            storage.write(f"{prefix}/{facts['head']}", data)
    storage.write_json(f"{prefix}/_teacher.json", facts)


def stored_teachers(storage: Storage) -> list[tuple[TeacherDescription, SignalSpec]]:
    """Every teacher and signal that has labels here."""
    found = []
    for item in storage.list():
        if item.key.endswith("/_teacher.json"):
            facts = json.loads(storage.read(item.key))
            signal = {**facts["signal"], "temperatures": tuple(facts["signal"]["temperatures"])}
            found.append((TeacherDescription(**facts["description"]), SignalSpec(**signal)))
    return found
