"""Back and forth between champions with real files, and what one whose files are gone stops and does not stop."""

import json
import shutil

import pytest
import yaml

from cluster.canaries import next_step
from cluster.champions import current_champion, find_champion, open_database
from cluster.config import load
from cluster.errors import ConfigError, CorruptArtifact, ModelError, PromotionRefused
from cluster.promotions import history
from cluster.published import publish_directory
from cluster.registry import find_version, list_versions
from cluster.storage import open_storage
from cluster.tracking import set_alias
from jobs import rollback as rollback_module
from jobs.__main__ import app
from jobs.config import RunConfig
from jobs.promote import promote_version
from jobs.register import register
from jobs.rollback import rollback
from jobs.serve import check_champion
from jobs.versions import find_model, model_of, versions

MODEL = "r-student"
MACHINE = {"processor": "Sample CPU", "system": "Linux x86_64", "threads": "2"}


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """A run's storage with versions 1 to 3 registered, each a little better and larger than the one before."""
    root = tmp_path_factory.mktemp("made") / "r"
    storage, tracking = open_storage(str(root)), f"sqlite:///{root}/mlflow.db"
    for number in (1, 2, 3):
        source = root.parent / f"source-{number}"
        source.mkdir()
        (source / "model.safetensors").write_text(f"weights {number}")
        publish_directory(source, storage, f"quantized/{number}", scheme="int8_weight_only")
        figures = {"bits_per_byte": 2.1 - number / 100, "bytes": number * 1_234_567, "tokens_per_s": 200.0}
        artefact = {"uri": f"{storage.uri}/quantized/{number}", "measured": {**figures, "machine": MACHINE}}
        facts = {
            "run": "r",
            "float_student": {"bits_per_byte": 2.05},
            "teacher": {"bits_per_byte": 1.9, "bytes": 12_345_670, "tokens_per_s": 100.0, "machine": MACHINE},
        }
        register({"int8_weight_only": artefact}, MODEL, storage, tracking, None, facts)
    raw = {
        "name": "r",
        "storage": str(root),
        "data": {"sources": ["x"]},
        "teacher": {"model": "x"},
        "student": {"model": "x"},
        "train": {"steps": 1},
    }
    (root.parent / "r.yaml").write_text(yaml.safe_dump(raw))
    return root


@pytest.fixture
def config(made, tmp_path, monkeypatch):
    """Builds the run's config with a gate; its champions database is empty."""
    monkeypatch.setenv("RAYSTILL_DATABASE_URL", f"sqlite:///{tmp_path}/champions.db")
    return lambda *gate: load(RunConfig, made.parent / "r.yaml", list(gate))


@pytest.fixture
def model(config):
    return model_of(config())


@pytest.fixture
def files(made):
    """Where the files of a version are, for a test to damage; they are whole again after it."""
    shutil.copytree(made / "registry", made.parent / "kept")
    tracking = f"sqlite:///{made}/mlflow.db"
    yield lambda number: made / find_version(tracking, MODEL, number).source.removeprefix(f"{made.as_uri()}/")
    shutil.rmtree(made / "registry")
    (made.parent / "kept").rename(made / "registry")


def promoted(config, number, force=False):
    return promote_version(config, number, force)[0]


def back(model, to=None):
    return rollback(model.name, model.database, model.tracking, to=to, run="r")


def champion_alias(model):
    return [item.version for item in list_versions(model.tracking, model.name) if "champion" in item.aliases]


def states(model):
    engine = open_database(model.database)
    try:
        return [(row.kind, row.state, row.version) for row in history(engine, model.name)]
    finally:
        engine.dispose()


# --- rollback ---------------------------------------------------------------------------------------------------------


def test_rollback_and_promotion_ten_times_end_where_they_say(config, model):
    promoted(config(), "1")
    for turn in range(10):
        assert promoted(config(), "2").epoch == 2 + 2 * turn
        assert champion_alias(model) == ["2"]
        champion, before = back(model)
        assert (champion.version, champion.epoch, before.version) == ("1", 3 + 2 * turn, "2")
        assert find_champion(model.database, MODEL) == champion
        assert champion_alias(model) == ["1"]
    assert {state for _, state, _ in states(model)} == {"announced"}
    assert [version for _, _, version in states(model)] == ["1", *["2", "1"] * 10]


def test_two_rollbacks_lead_two_champions_back_and_a_third_is_refused(config, model):
    for number in "123":
        promoted(config(), number)
    assert back(model)[0].version == "2"
    assert back(model)[0].version == "1"
    with pytest.raises(PromotionRefused, match="there was no champion before version 1"):
        back(model)
    assert promoted(config(), "3").version == "3"
    assert back(model)[0].version == "1"  # what reigned before it, not what was left behind


def test_rollback_to_a_version_goes_there_if_it_ever_reigned(config, model):
    for number in "12":
        promoted(config(), number)
    assert back(model, to="1")[0].version == "1"
    assert back(model, to="2")[0].version == "2"
    same, before = back(model, to="2")
    assert same == before
    assert same.epoch == 4
    with pytest.raises(PromotionRefused, match="version 3 never was champion"):
        back(model, to="3")
    assert back(model)[0].version == "1"


def test_rollback_without_a_champion_is_refused_and_makes_no_database(config, model, tmp_path):
    with pytest.raises(PromotionRefused, match="has no champion"):
        back(model)
    assert not list(tmp_path.glob("*.db"))


@pytest.mark.parametrize("damage", ["byte", "gone", "pickle"])
def test_rollback_to_damaged_files_is_refused_and_written_down(config, model, files, damage):
    for number in "12":
        promoted(config(), number)
    if damage == "byte":
        (files("1") / "model.safetensors").write_text("weights X")
    elif damage == "gone":
        shutil.rmtree(files("1"))
    else:
        (files("1") / "evil.pkl").write_bytes(b"\x80\x02.")
    with pytest.raises(PromotionRefused, match=r"rollback of r-student to version 1: .*version 2 stays"):
        back(model)
    assert find_champion(model.database, MODEL).version == "2"
    assert states(model)[-1] == ("rollback", "refused", "1")


# --- a champion whose files are gone ----------------------------------------------------------------------------------


@pytest.mark.parametrize("damage", ["byte", "gone", "manifest"])
def test_damaged_champion_is_said_at_once_and_may_be_replaced(config, model, files, damage):
    for number in "12":
        promoted(config(), number)
    check_champion(config())
    if damage == "byte":
        (files("2") / "model.safetensors").write_text("weights X")
    elif damage == "gone":
        shutil.rmtree(files("2"))
    else:
        (files("2") / "manifest.json").write_text("{}")
    with pytest.raises(CorruptArtifact, match="champion, version 2, cannot be served"):
        check_champion(config())
    gate = config("promote.champion.max_quality_drop=0")  # version 3 is better, as the manifest of version 2 has it
    if damage == "byte":
        champion, _ = promote_version(gate, "3", force=False)
    else:
        with pytest.raises(PromotionRefused, match="version 2, whose manifest is gone or damaged, was not measured"):
            promote_version(gate, "3", force=False)
        champion, _ = promote_version(config(), "3", force=False)
    assert champion.version == "3"
    check_champion(config())
    with pytest.raises(PromotionRefused, match="rollback of r-student to version 2"):
        back(model)
    assert back(model, to="1")[0].version == "1"


def test_rollback_ends_a_canary_that_takes_a_step_meanwhile(config, model, monkeypatch):
    canary = "serve.canary={steps: [0.1, 0.5], min_requests: 10}"
    promoted(config(), "1")
    promote_version(config(canary), "2", force=False)
    read, seen = rollback_module.running_canary, []

    def steps_up_meanwhile(engine, name):
        found = read(engine, name)
        if not seen:
            seen.append(next_step(engine, found, {}))
        return found

    monkeypatch.setattr(rollback_module, "running_canary", steps_up_meanwhile)
    ended = rollback_module.end_running_canary(model.name, model.database, model.tracking)
    assert (ended.state, ended.step) == ("ended", 1)
    assert find_champion(model.database, MODEL).version == "1"


def test_serve_without_a_champion_says_so(config):
    with pytest.raises(ConfigError, match="has no champion"):
        check_champion(config())


# --- a version by its number -----------------------------------------------------------------------------------------


def test_version_is_judged_by_the_figures_of_its_manifest(config, model):
    gate = ("promote.max_size_mb=2", "promote.max_latency_ratio=0.4", "promote.min_retention=0.99")
    with pytest.raises(PromotionRefused) as caught:
        promoted(config(*gate), "2")
    for words in (
        "version 2 of r-student is refused: promote.min_retention: 2.08 bits per byte against 1.9 of the teacher",
        "promote.max_latency_ratio: 5 ms per token against 10 of the teacher is 0.5 times, allowed 0.4",
        "promote.max_size_mb: 2.469 MB of weights, allowed 2",
        "--force",
    ):
        assert words in str(caught.value)
    assert find_champion(model.database, MODEL) is None
    assert promoted(config(*gate), "2", force=True).version == "2"


def test_champion_rules_read_the_manifest_of_the_champion(config, model):
    promoted(config(), "3")
    gate = config("promote.champion.max_quality_drop=0", "promote.champion.max_latency_ratio=1")
    with pytest.raises(PromotionRefused, match=r"2\.09 bits per byte against 2\.07 of the champion, version 3"):
        promoted(gate, "1")
    assert promoted(gate, "3").epoch == 1  # who reigns is not asked to beat itself
    back_again = config("promote.champion.max_quality_drop=0.01", "promote.champion.max_latency_ratio=1")
    assert promoted(back_again, "1").epoch == 2
    grown = config("promote.champion.max_size_ratio=1.5", "promote.champion.min_retention=1")
    with pytest.raises(PromotionRefused) as caught:
        promoted(grown, "2")
    assert "2.469 MB of weights against 1.235 of the champion, version 1 is 2 times" in str(caught.value)
    assert "min_retention" not in str(caught.value)
    tagged = next(item for item in list_versions(model.tracking, MODEL) if item.version == "2").tags
    assert "promote.champion.max_size_ratio: 2.469 MB" in tagged["verdict_rules"]


def test_figures_that_were_changed_after_the_registration_are_not_believed(config, model, files):
    path = files("1") / "manifest.json"
    manifest = json.loads(path.read_text())
    manifest["measured"]["bits_per_byte"] = 0.1
    path.write_text(json.dumps(manifest))
    with pytest.raises(PromotionRefused, match="not its own sha256"):
        promoted(config(), "1", force=True)
    manifest.pop("sha256")
    path.write_text(json.dumps(manifest))
    with pytest.raises(PromotionRefused, match="not the one that was registered"):
        promoted(config(), "1", force=True)


def test_version_that_is_not_there_is_one_line(config, monkeypatch, tmp_path):
    with pytest.raises(ModelError, match="asked for version 9, the registry has 1, 2, 3"):
        promoted(config(), "9")
    with pytest.raises(ConfigError, match="no registry in"):
        promoted(config(f"storage={tmp_path}/empty"), "1")
    assert not (tmp_path / "empty").exists()


# --- the table --------------------------------------------------------------------------------------------------------


def test_versions_say_figures_champion_verdict_and_history(config, model):
    promoted(config(), "1")
    with pytest.raises(PromotionRefused):
        promoted(config("promote.max_size_mb=1"), "2")
    found = versions(model)
    assert json.loads(json.dumps(found)) == found
    assert [row["version"] for row in found["versions"]] == ["1", "2", "3"]
    first, second, _ = found["versions"]
    assert (first["scheme"], first["run"], first["bytes"]) == ("int8_weight_only", "r", 1_234_567)
    assert first["bits_per_byte"] == pytest.approx(2.09)
    assert (first["aliases"], second["aliases"]) == (["champion"], [])
    assert (first["verdict"], second["verdict"]) == ("passed", "refused")
    assert [entry["state"] for entry in found["history"]] == ["announced", "refused"]
    assert found["champion"]["version"] == "1"


def test_versions_repair_the_alias_from_the_row(config, model):
    promoted(config(), "1")
    set_alias(model.tracking, MODEL, "champion", "3")
    assert versions(model)["versions"][0]["aliases"] == ["champion"]
    assert champion_alias(model) == ["1"]


def test_versions_of_a_run_are_found_by_its_name_root_or_config(made, model, monkeypatch, tmp_path):
    (made / "summary.json").write_text(json.dumps({"name": "r", "storage": made.as_uri(), "stages": {}}))
    assert find_model(str(made)) == find_model(made.as_uri()) == model
    monkeypatch.chdir(tmp_path)
    (tmp_path / "runs").mkdir()
    (tmp_path / "runs" / "r").symlink_to(made)
    assert find_model("r").name == MODEL
    for nothing in ("nothing", "a/b"):
        with pytest.raises(ConfigError, match=r"no run in .* set MLFLOW_TRACKING_URI"):
            find_model(nothing)
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "http://127.0.0.1:1")
    assert find_model(MODEL).name == MODEL
    with pytest.raises(ConfigError, match="without '/'"):
        find_model("a/b")


# --- the commands -----------------------------------------------------------------------------------------------------


def call(capsys, *arguments):
    with pytest.raises(SystemExit) as ended:
        app(list(arguments))
    out = capsys.readouterr()
    return ended.value.code, out.out, out.err


def test_commands_promote_roll_back_and_show(made, config, model, capsys, monkeypatch):
    monkeypatch.setattr("cluster.interrupts.raise_on_signals", lambda: None)
    path = str(made.parent / "r.yaml")
    for number in "12":
        code, out, _ = call(capsys, "promote", path, "--version", number)
        assert (code, out) == (0, f"r-student: version {number} is champion (epoch {number})\n")
    code, out, _ = call(capsys, "rollback", path, "--json")
    assert code == 0
    assert json.loads(out)["champion"]["version"] == "1"
    code, out, _ = call(capsys, "rollback", path, "--to", "2")
    assert (code, out) == (0, "r-student: version 2 is champion (epoch 4), before 1\n")
    code, out, _ = call(capsys, "versions", path, "--json")
    assert [row["aliases"] for row in json.loads(out)["versions"]] == [[], ["champion"], []]
    code, out, _ = call(capsys, "versions", path)
    assert code == 0
    assert "champion" in out
    assert "2.0800" in out
    code, out, err = call(capsys, "promote", path, "promote.max_size_mb=1", "--version", "3")
    assert (code, out) == (1, "")
    assert "promote.max_size_mb: 3.704 MB" in err
    assert "\n" not in err.strip()
    code, _, err = call(capsys, "promote", path, "promote.max_quality_loss=1", "--version", "3")
    assert code == 2
    assert "called max_quality_drop now" in err
    code, _, err = call(capsys, "versions", path, "register.model_name=a/b")
    assert code == 2
    assert "register.model_name" in err
    code, _, _ = call(capsys, "promote", path, "promote.max_size_mb=1", "--version", "3", "--force")
    assert code == 0
    assert current(model) == "3"


def current(model):
    engine = open_database(model.database)
    try:
        return current_champion(engine, MODEL).version
    finally:
        engine.dispose()


# --- last, for they register a version more ---------------------------------------------------------------------------


def test_champion_measured_on_other_text_is_no_measure_of_quality(made, config, model):
    storage = open_storage(str(made))
    source = made.parent / "other-text"
    if not source.exists():
        source.mkdir()
        (source / "model.safetensors").write_text("other weights")
    publish_directory(source, storage, "quantized/other", scheme="int8_weight_only")
    figures = {"bits_per_byte": 1.0, "bytes": 1, "tokens_per_s": 200.0, "machine": MACHINE}
    artefact = {"uri": f"{storage.uri}/quantized/other", "measured": figures}
    facts = {"run": "r", "float_student": {"bits_per_byte": 1.0}, "data_fingerprint": "easier text"}
    register({"int8_weight_only": artefact}, MODEL, storage, model.tracking, None, facts)
    number = max(item.version for item in list_versions(model.tracking, MODEL))
    promoted(config(), "1")
    with pytest.raises(PromotionRefused, match=r"version 1, on the candidate's held-out text, was not measured"):
        promote_version(config("promote.champion.max_quality_drop=0.5"), number, force=False)
    gate = config("promote.champion.max_latency_ratio=2")  # time is not of the text
    assert promote_version(gate, number, force=False)[0].version == number
