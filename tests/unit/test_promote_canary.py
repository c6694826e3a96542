"""Promotion by way of a canary: who is challenger, what MLflow and the commands say, and what ends it.

The endpoint's part, the steps and the limits, is in `test_endpoint_supervisor.py`.
"""

import json

import pytest

from cluster.canaries import begin, crown_canary, end_canary, latest_canary
from cluster.champions import current_champion, find_champion, open_database
from cluster.crowning import announce
from cluster.errors import PromotionRefused
from cluster.promotions import advance, propose
from cluster.registry import find_version, list_versions, point_challenger
from cluster.storage import open_storage
from jobs.promote import promote_version
from jobs.register import register
from jobs.versions import versions
from tests.unit.test_rollback import MODEL, call, config, current, files, made, model, promoted, states

__all__ = ["config", "files", "made", "model"]  # fixtures


@pytest.fixture(autouse=True)
def _no_challenger(model):
    """The registry is shared by the tests, the database is not: no test finds another one's alias."""
    point_challenger(model.tracking, MODEL, None)


CANARY = "serve.canary={steps: [0.1, 0.5], min_requests: 10}"


def aliases(model):
    return {alias: item.version for item in list_versions(model.tracking, model.name) for alias in item.aliases}


def tags_of(model, number):
    return find_version(model.tracking, MODEL, number).tags


def canary_of(model):
    engine = open_database(model.database)
    try:
        return latest_canary(engine, MODEL)
    finally:
        engine.dispose()


def take_down(model, reason="error rate: 3 of 3 answers failed"):
    """As the endpoint does it: the row, then what MLflow has of it."""
    engine = open_database(model.database)
    try:
        assert end_canary(engine, latest_canary(engine, MODEL), "failed", reason, {"errors": 3}) is not None
        announce(engine, MODEL, model.tracking)
    finally:
        engine.dispose()


def test_promotion_with_a_canary_makes_a_challenger_and_the_first_version_champion_at_once(config, model):
    promoted(config(CANARY), "1")
    assert aliases(model) == {"champion": "1"}
    champion, verdict = promote_version(config(CANARY), "2", force=False)
    assert (champion.version, verdict["canary"]["version"], verdict["canary"]["share"]) == ("1", "2", 0.1)
    assert find_champion(model.database, MODEL).version == "1"
    assert aliases(model) == {"champion": "1", "challenger": "2"}
    assert tags_of(model, "2")["canary"] == "running, 10% of the traffic"
    found = versions(model)
    assert [(row["aliases"], row["share"]) for row in found["versions"]] == [
        (["champion"], 0.9),
        (["challenger"], 0.1),
        ([], 0.0),
    ]
    assert (found["canary"]["state"], found["canary"]["steps"]) == ("running", [0.1, 0.5])
    assert json.loads(json.dumps(found)) == found
    again, verdict = promote_version(config(CANARY), "2", force=False)  # asking again changes nothing
    assert (again.version, verdict["canary"]["step"], len(states(model))) == ("1", 0, 2)
    with pytest.raises(PromotionRefused, match=r"version 2 \(10% of the traffic\) is a canary now"):
        promote_version(config(CANARY), "3", force=False)
    assert aliases(model) == {"champion": "1", "challenger": "2"}


def test_canary_does_not_decide_what_a_run_produces(config):
    assert config(CANARY) != config()
    assert config(CANARY).identity() == config().identity()


def test_canary_that_failed_is_not_tried_again_unless_forced(config, model):
    promoted(config(CANARY), "1")
    promote_version(config(CANARY), "2", force=False)
    take_down(model)
    assert aliases(model) == {"champion": "1"}
    assert (tags_of(model, "2")["canary"], tags_of(model, "2")["canary_reason"]) == (
        "failed",
        "error rate: 3 of 3 answers failed",
    )
    assert json.loads(tags_of(model, "2")["canary_figures"]) == {"errors": 3}
    for overrides in ((CANARY,), ()):
        with pytest.raises(PromotionRefused, match=r"its canary was taken down at .* \(error rate: 3 of 3 answers"):
            promote_version(config(*overrides), "2", force=False)
    assert [state for _, state, _ in states(model)] == ["announced", "rolled_back", "refused", "refused"]
    promote_version(config(CANARY), "2", force=True)
    assert aliases(model) == {"champion": "1", "challenger": "2"}
    assert canary_of(model).state == "running"


def test_end_of_a_canary_that_mlflow_missed_is_repaired_by_the_next_look(config, model):
    promoted(config(CANARY), "1")
    promote_version(config(CANARY), "2", force=False)
    engine = open_database(model.database)
    end_canary(engine, latest_canary(engine, MODEL), "failed", "slow")
    engine.dispose()
    assert aliases(model) == {"champion": "1", "challenger": "2"}
    assert [row["canary"] for row in versions(model)["versions"]] == [None, "failed", None]
    assert aliases(model) == {"champion": "1"}
    assert tags_of(model, "2")["canary_reason"] == "slow"


@pytest.mark.parametrize(
    ("end", "said", "reason"),
    [
        ("failed", "failed", "slow"),
        ("ended", "ended", "by hand"),
        ("overtaken", "overtaken", "late"),
        (None, "passed", ""),
    ],
)
def test_end_that_mlflow_missed_is_told_with_the_next_canary(config, model, end, said, reason):
    promoted(config(CANARY), "1")
    promote_version(config(CANARY), "2", force=False)
    assert tags_of(model, "2")["canary"] == "running, 10% of the traffic"
    engine = open_database(model.database)
    if end is None:
        assert crown_canary(engine, latest_canary(engine, MODEL), {}) is not None
    else:
        assert end_canary(engine, latest_canary(engine, MODEL), end, reason) is not None
    # What the same version does later, without a canary, says nothing of the one that it had.
    other = propose(engine, MODEL, find_version(model.tracking, MODEL, "2").artefact, None, "test")
    advance(engine, other, "abandoned", reason="its process ended")
    seen = current_champion(engine, MODEL)
    proposed = propose(engine, MODEL, find_version(model.tracking, MODEL, "3").artefact, seen, "test")
    begin(engine, advance(engine, proposed, "checked"), {"steps": [0.3]})
    assert tags_of(model, "2")["canary"] == "running, 10% of the traffic"
    announce(engine, MODEL, model.tracking)
    engine.dispose()
    assert (tags_of(model, "2")["canary"], tags_of(model, "2")["canary_reason"]) == (said, reason)
    assert tags_of(model, "3")["canary"] == "running, 30% of the traffic"
    assert aliases(model)["challenger"] == "3"


def test_rollback_during_a_canary_ends_it_and_the_champion_stays(made, config, model, capsys, monkeypatch):
    monkeypatch.setattr("cluster.interrupts.raise_on_signals", lambda: None)
    path = str(made.parent / "r.yaml")
    assert call(capsys, "promote", path, CANARY, "--version", "1")[0] == 0
    code, out, _ = call(capsys, "promote", path, CANARY, "--version", "2")
    assert code == 0
    assert "version 2 is challenger, at 10% of the traffic (steps: 10%, 50%); version 1 stays champion" in out
    assert "versions" in out.splitlines()[-1]
    code, out, _ = call(capsys, "versions", path)
    assert code == 0
    assert "challenger 10%" in out
    assert "champion 90%" in out
    code, out, _ = call(capsys, "rollback", path)
    assert (code, out) == (0, "r-student: the canary of version 2 is ended, the champion stays\n")
    assert aliases(model) == {"champion": "1"}
    assert canary_of(model).state == "ended"
    assert call(capsys, "promote", path, CANARY, "--version", "2")[0] == 0, "it was ended, it did not fail"
    assert call(capsys, "rollback", path, "--to", "1")[0] == 0
    assert canary_of(model).state == "ended"
    assert current(model) == "1"


def test_promotion_without_a_canary_overtakes_one_that_runs(config, model):
    promoted(config(CANARY), "1")
    promote_version(config(CANARY), "2", force=False)
    assert promoted(config(), "3").version == "3"
    assert aliases(model) == {"champion": "3", "challenger": "2"}
    versions(model)
    assert aliases(model) == {"champion": "3"}
    assert canary_of(model).state == "overtaken"


def test_damaged_or_worse_version_does_not_become_challenger(config, model, files):
    promoted(config(CANARY), "1")
    with pytest.raises(PromotionRefused, match=r"promote\.max_size_mb"):
        promote_version(config(CANARY, "promote.max_size_mb=1"), "2", force=False)
    damage = files(2) / "model.safetensors"
    damage.write_text("other")
    with pytest.raises(PromotionRefused, match=r"model\.safetensors has sha256"):
        promote_version(config(CANARY), "2", force=True)
    assert canary_of(model) is None
    assert aliases(model) == {"champion": "1"}


# --- last, for they register a version more ---------------------------------------------------------------------------


def test_same_files_with_other_figures_are_the_same_bytes(made, config, model):
    storage = open_storage(str(made))
    promoted(config(CANARY), "1")
    promote_version(config(CANARY), "2", force=False)
    take_down(model)
    figures = {"bits_per_byte": 2.0, "bytes": 1, "tokens_per_s": 999.0}
    artefact = {"uri": f"{storage.uri}/quantized/2", "measured": figures}
    facts = {"run": "r", "float_student": {"bits_per_byte": 2.05}}
    register({"int8_weight_only": artefact}, MODEL, storage, model.tracking, None, facts)
    number = max(item.version for item in list_versions(model.tracking, MODEL))
    with pytest.raises(PromotionRefused, match="its canary was taken down at"):
        promote_version(config(CANARY), number, force=False)
