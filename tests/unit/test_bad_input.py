"""Every mistake through the real command line: exit code 2, one line with a way out, and no file left behind.

All cases run once, each in a process of its own; each test then looks at its case.
"""

import gzip
import json
import re
import shutil
import socket
from dataclasses import dataclass, field
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import yaml

from cluster.errors import ConfigError, CorpusError, ModelError, PlacementError, StorageError
from jobs.config import DataConfig, RunConfig
from jobs.corpus import find_sources, read_documents
from jobs.preflight import check_config, check_cpus, check_gpus
from tests import tiny
from tests.command_line import environment


@dataclass
class Case:
    """A mistake, and the words that its one line must have: what was asked, what was found, what to do."""

    words: list[str]
    overrides: list[str] = field(default_factory=list)
    kind: str = "ConfigError"
    command: str = "run"
    config: dict[str, Any] = field(default_factory=dict)
    environment: dict[str, str] = field(default_factory=dict)
    kept: list[str] = field(default_factory=list)
    """Files that lay below the storage root before."""


NO_SHAPE = ["student.shape=null", "data.train_tokenizer=null"]
CASES = {
    "unknown_key": Case(["unknown key train.stepz", "did you mean train.steps?"], ["train.stepz=1"]),
    "unknown_key_deep": Case(
        ["unknown key data.train_tokenizer.vocab", "data.train_tokenizer.vocab_size?"], ["data.train_tokenizer.vocab=9"]
    ),
    "missing_config": Case(["no such file", "jobs/configs/"], command="run missing.yaml"),
    "corpus_empty": Case(
        ["empty.jsonl", "the file is empty", "remove it or fill it"], ["data.sources=[in/empty.jsonl]"], "CorpusError"
    ),
    "corpus_of_empty_texts": Case(
        ["0 training rows", "one batch needs 4", "add text"], ["data.sources=[in/blank.jsonl]"], "CorpusError"
    ),
    "corpus_missing": Case(
        ["data.sources nowhere/at/all", "nothing there", ".jsonl", "check the path"],
        ["data.sources=[nowhere/at/all]"],
        "CorpusError",
    ),
    "corpus_jsonl_cut": Case(
        ["in/cut_jsonl/cut.jsonl", "line 40 is not JSON", "cut off"], ["data.sources=[in/cut_jsonl]"], "CorpusError"
    ),
    "corpus_gz_cut": Case(
        ["in/cut_gz/cut.jsonl.gz", "cannot be read to its end", "replace or remove it"],
        ["data.sources=[in/cut_gz]"],
        "CorpusError",
    ),
    "corpus_gz_cut_with_given_tokenizer": Case(
        ["in/cut_gz/cut.jsonl.gz", "cannot be read to its end"],
        ["data.sources=[in/cut_gz]", "data.train_tokenizer=null", "student.tokenizer=models/one"],
        "CorpusError",
    ),
    "corpus_smaller_than_a_batch": Case(
        ["training rows", "one batch needs 5000", "add text, or lower train.global_batch"],
        ["train.global_batch=5000"],
        "CorpusError",
    ),
    "vocabularies_differ": Case(
        ["teacher models/one has 320 tokens", "models/two has 300", "id ", "use the teacher's tokenizer"],
        ["teacher.model=models/one", "student={model: models/two}", *["data.train_tokenizer=null"]],
        "TokenizerMismatch",
    ),
    "model_without_weights": Case(
        ["models/empty", "no *.safetensors weights", "config.json", "save_pretrained"],
        ["teacher.model=models/empty", "data.train_tokenizer=null"],
        "ModelError",
    ),
    "model_missing": Case(
        ["model ./models/none", "no such directory", "hub id"],
        ["teacher.model=./models/none", "data.train_tokenizer=null"],
        "ModelError",
    ),
    "gguf_file_missing": Case(
        ["model models/one", "no file x.gguf", "GGUF files there: none"],
        ["teacher.model=models/one", "teacher.gguf_file=x.gguf", "data.train_tokenizer=null"],
        "ModelError",
    ),
    "layers_out_of_range": Case(
        ["student.from_teacher.layers=[0, 9]", "layers 0..1"],
        ["teacher.model=models/one", "student={from_teacher: {layers: [0, 9]}}", "data.train_tokenizer=null"],
        "ModelError",
    ),
    "rows_longer_than_the_teacher_takes": Case(
        ["data.sequence_length=300", "teacher takes at most 256 tokens", "lower data.sequence_length"],
        ["teacher.model=models/one", "data.sequence_length=300", "data.train_tokenizer=null"],
        "ModelError",
    ),
    "vocabulary_smaller_than_the_tokenizer": Case(
        ["student has 100 embedding rows", "tokenizer 400 tokens", "leave vocab_size out"],
        ["student.shape.vocab_size=100"],
        "ModelError",
    ),
    "more_workers_than_the_cluster_can_hold": Case(
        ["train.num_workers=64", "this machine has 8", "lower the counts", "cluster.num_cpus"],
        ["train.num_workers=64", "train.global_batch=64", "cluster.num_cpus=8"],
        "PlacementError",
    ),
    "cluster_does_not_answer": Case(
        ["cluster.address", "127.0.0.1:1", "no connection", "check the address"],
        ["cluster.address=127.0.0.1:1"],
        "ClusterUnreachable",
    ),
    "storage_not_writable": Case(
        ["in/empty.jsonl/below", "not writable", "choose another root with storage="],
        ["storage=in/empty.jsonl/below"],
        "StorageError",
    ),
    "storage_of_unknown_scheme": Case(
        ["ftp://x/y", "unknown scheme", "use file:// or s3://"], ["storage=ftp://x/y"], "StorageError"
    ),
    "storage_of_another_run": Case(
        ["holds run 'somebody'", "name='mine'", "choose another storage, or use that name"],
        [],
        "StorageError",
        kept=["summary.json"],
    ),
    "port_in_use": Case(
        ["asked to listen on 127.0.0.1:{port}", "in use", "serve.port="], ["serve.port={port}"], "PortInUse"
    ),
    "corpus_of_half_a_character": Case(
        ["in/half.jsonl", "line 2", "half a character", "\\ud800", "repair or remove it"],
        ["data.sources=[in/half.jsonl]"],
        "CorpusError",
    ),
    "corpus_with_an_endless_number": Case(
        ["in/digits.jsonl", "line 1 is not JSON", "4300 digits"], ["data.sources=[in/digits.jsonl]"], "CorpusError"
    ),
    "corpus_of_one_long_text": Case(
        ["no document of 1 was held out", "a .txt file is one"], ["data.sources=[in/long.txt]"], "CorpusError"
    ),
    "corpus_of_txt_where_chats_are_asked_for": Case(
        ["in/long.txt", "a .txt holds plain text", "data.format=messages needs .jsonl or .parquet"],
        ["data.sources=[in/long.txt]", "data.format=messages"],
        "CorpusError",
    ),
    "corpus_without_messages": Case(
        ["corpus.jsonl: line 1", "no list of messages", "'messages' (found: text)", "set data.messages_column"],
        ["data.format=messages"],
        "CorpusError",
    ),
    "columns_of_another_format": Case(
        ["data: prompt_column=q is read only with format=prompt_completion", "found format=text", "change one"],
        ["data.prompt_column=q"],
    ),
    "dry_run_of_a_broken_corpus": Case(
        ["in/cut_jsonl/cut.jsonl", "line 40 is not JSON"],
        ["data.sources=[in/cut_jsonl]", "--dry-run"],
        "CorpusError",
        command="prepare",
    ),
    "corpus_without_a_name": Case(["empty name"], ['data.sources=[""]'], "CorpusError"),
    "package_of_no_name": Case(
        ["package://..", "not installed"], ["student.model=package://..", *NO_SHAPE], "ModelError"
    ),
    "betas_out_of_range": Case(["train.betas", "less than 1"], ["train.betas=[2,3]"]),
    "temperature_out_of_range": Case(["distill.temperature", "0.01"], ["distill.temperature=1e-300"]),
    "seed_out_of_range": Case(["train.seed", "4294967296"], ["train.seed=18446744073709551616"]),
    "shape_that_cannot_run": Case(
        ["student.shape", "LlamaConfig", "cannot be run", "nope"], ["student.shape.hidden_act=nope"]
    ),
    "shape_without_layers": Case(["student.shape", "num_hidden_layers=-1"], ["student.shape.num_hidden_layers=-1"]),
    "shape_key_unknown": Case(
        ["student.shape", "llama has no key hiden_size", "hidden_size"], ["student.shape.hiden_size=8"]
    ),
    "shape_values_refused": Case(["student.shape", "refused"], ["student.shape.hidden_size=33"]),
    "database_down": Case(
        ["champions database", "cannot be opened", "RAYSTILL_DATABASE_URL"],
        [],
        "StorageError",
        environment={"RAYSTILL_DATABASE_URL": "sqlite:////proc/nowhere/x.db"},
    ),
    "task_file_missing": Case(
        ["evaluate.tasks quiz", "in/none.jsonl", "no such file", "check the path"],
        ["evaluate.tasks=[{name: quiz, format: mmlu, source: in/none.jsonl}]"],
        "CorpusError",
    ),
    "task_file_of_something_else": Case(
        ["evaluate.tasks quiz", "line 1 has no 'question' (found: text)", "a question of format mmlu has question"],
        ["evaluate.tasks=[{name: quiz, format: mmlu, source: in/good/corpus.jsonl}]"],
        "CorpusError",
    ),
    "task_without_its_shots": Case(
        ["shots=5", "shots_source", "set both or none"],
        ["evaluate.tasks=[{name: quiz, format: mmlu, source: x.jsonl, shots: 5}]"],
    ),
    "train_before_prepare": Case(
        ["stage teacher needs prepare", "`raystill prepare` comes first, or use `raystill run`"], command="train"
    ),
    "promote_before_everything": Case(["stage promote needs prepare", "comes first"], command="promote"),
    "serve_before_promote": Case(["mine-student has no champion", "`raystill run` makes one"], command="serve"),
    "log_level_unknown": Case(["unknown key foo"], ["foo=1"], environment={"RAYSTILL_LOG": "loud"}),
}
NO_JSON = {"serve_before_promote"}


def config_of(case):
    return {
        "name": "mine",
        "storage": "out",
        "data": {"sources": ["in/good"], "sequence_length": 32, "train_tokenizer": {"vocab_size": 400}},
        "student": {
            "shape": {"model_type": "llama", "hidden_size": 32, "num_attention_heads": 2, "num_hidden_layers": 1}
        },
        "distill": {"alpha": 1},
        "train": {"steps": 2, "global_batch": 4},
        **case.config,
    }


@pytest.fixture(scope="module")
def results(tmp_path_factory, forked_raystill):
    """What every case printed and left: `name -> (exit code, stdout, stderr, files that are new)`."""
    shared = tmp_path_factory.mktemp("shared")
    build_inputs(shared)
    with socket.socket() as busy:
        busy.bind(("127.0.0.1", 0))
        busy.listen()
        port = str(busy.getsockname()[1])

        def run(name):
            case, here = CASES[name], tmp_path_factory.mktemp(name)
            for part in ("in", "models"):
                (here / part).symlink_to(shared / part)
            (here / "mine.yaml").write_text(yaml.safe_dump(config_of(case)))
            for kept in case.kept:
                (here / "out").mkdir(exist_ok=True)
                (here / "out" / kept).write_text(json.dumps({"name": "somebody"}))
            before = files(here)
            verb, _, other = case.command.partition(" ")
            arguments = [verb, other or "mine.yaml", *(item.replace("{port}", port) for item in case.overrides)]
            arguments += [] if name in NO_JSON else ["--json"]
            done = forked_raystill(*arguments, cwd=here, env={**environment(), **case.environment})
            return name, (done.returncode, done.stdout, done.stderr.replace(port, "{port}"), files(here) - before)

        return dict(run(name) for name in CASES)


def files(directory):
    return {str(path.relative_to(directory)) for path in directory.rglob("*") if path.is_file()}


def build_inputs(directory):
    good = tiny.corpus(directory / "in" / "good", 40)
    lines = good.read_bytes()
    (directory / "in" / "empty.jsonl").touch()
    (directory / "in" / "half.jsonl").write_text('{"text": "whole"}\n{"text": "half \\ud800"}\n')
    (directory / "in" / "digits.jsonl").write_text('{"text": "a", "n": ' + "1" * 5000 + "}\n")
    (directory / "in" / "long.txt").write_text(" ".join(tiny.sentences(400)))
    (directory / "in" / "blank.jsonl").write_text('{"text": ""}\n{"text": "  "}\n')
    for name, content in (("cut.jsonl", lines[:-9]), ("cut.jsonl.gz", gzip.compress(lines)[:-20])):
        target = directory / "in" / name.removeprefix("cut.").join(["cut_", ""]).replace("jsonl.gz", "gz")
        shutil.copytree(good.parent, target)
        (target / name).write_bytes(content)
        (target / "z.jsonl").write_bytes(lines)
    tiny.save_model(directory / "models" / "one")
    tiny.save_model(directory / "models" / "two", vocab_size=300)
    tiny.tokenizer(directory / "models" / "two", 300)
    shutil.copytree(directory / "models" / "one", directory / "models" / "empty")
    (directory / "models" / "empty" / "model.safetensors").unlink()


@pytest.mark.parametrize("name", CASES)
def test_bad_input_is_refused_in_one_line_and_leaves_nothing(results, name):
    case = CASES[name]
    code, stdout, stderr, new_files = results[name]
    assert code == 2, stderr
    lines = stderr.splitlines()
    # Before it there may be what `prepare` says while it reads, and the warning about the level of the log.
    said = [
        item for item in lines if not re.match(r"prepare  |\d\d:\d\d:\d\d WARNING cluster.logs: RAYSTILL_LOG=", item)
    ]
    assert len(said) == 1, stderr
    line = lines[-1]
    assert line.startswith("raystill: ")
    assert all(word in line for word in case.words), line
    assert "Traceback" not in stderr
    assert not new_files
    if name not in NO_JSON:
        printed = json.loads(stdout.splitlines()[-1].replace(_port_of(line, stdout), "{port}"))
        assert printed == {"error": line.removeprefix("raystill: "), "error_type": case.kind, "exit_code": 2}


def _port_of(line, stdout):
    found = re.search(r"127\.0\.0\.1:(\d+)", stdout)
    return found[1] if found and "{port}" in line else "no port"


# --- the same checks, called directly ---------------------------------------------------------------------------------


def made(tmp_path, **changes):
    raw = config_of(Case([]))
    tiny.corpus(tmp_path / "in", 40)
    raw["data"]["sources"] = [str(tmp_path / "in")]
    raw["storage"] = str(tmp_path / "out")
    return RunConfig.model_validate({**raw, **changes})


def test_good_config_passes_all_checks_and_leaves_nothing(tmp_path):
    check_config(made(tmp_path))
    assert not (tmp_path / "out").exists()


def test_checks_placement_of_every_training(tmp_path):
    model = str(tiny.save_model(tmp_path / "model"))
    config = made(
        tmp_path,
        distill={"alpha": 0.5},
        teacher={"model": model, "replicas": 3, "threads_per_replica": 2},
        train={"steps": 1, "num_workers": 2, "threads_per_worker": 2},
        student={"from_teacher": {"layers": [1]}},
        data={"sources": ["x"]},
    )
    check_cpus(config, 10, "here")
    with pytest.raises(
        PlacementError, match=r"2 x 2 threads\) \+ 6 \(teacher.replicas=3 x 2 threads\) = 10 CPUs, here"
    ):
        check_cpus(config, 9, "here")
    shaped = config.teacher.replace(
        model=None, shape={"model_type": "llama"}, train={"steps": 1, "num_workers": 12, "threads_per_worker": 1}
    )
    changed = {"teacher": shaped, "data": {"sources": ["x"], "train_tokenizer": {}}}
    with pytest.raises(PlacementError, match=r"teacher\.train\.num_workers=12.*here has 11"):
        check_cpus(config.replace(**changed), 11, "here")


def test_checks_gpus_that_are_not_there(tmp_path):
    config = made(tmp_path, train={"steps": 1, "num_workers": 2, "use_gpu": True})
    check_gpus(config, 2, "here")
    with pytest.raises(PlacementError, match=r"asked for 2 \(train.use_gpu.*here has 1: lower the counts"):
        check_gpus(config, 1, "here")
    check_gpus(made(tmp_path), 0, "here")


def test_checks_layers_that_a_shaped_teacher_will_not_have(tmp_path):
    shape = config_of(Case([]))["student"]["shape"]
    teacher = {"shape": {**shape, "num_hidden_layers": 3}, "train": {"steps": 1}}
    for layers, fits in (([0, 2], True), ([0, 3], False), ([1, 1], False), ([-1], False)):
        config = made(tmp_path, teacher=teacher, student={"from_teacher": {"layers": layers}})
        if fits:
            check_config(config)
        else:
            with pytest.raises(ModelError, match=r"layers 0\.\.2, each can be kept once"):
                check_config(config)


def test_checks_config_of_a_model_that_is_damaged(tmp_path):
    model = tiny.save_model(tmp_path / "model")
    (model / "config.json").write_text('{"model_type": "llama", ')
    with pytest.raises(ModelError, match="model") as caught:
        check_config(made(tmp_path, student={"model": str(model)}, data={"sources": [str(tmp_path / "in")]}))
    assert "\n" not in str(caught.value)


def test_checks_storage_that_is_not_a_runs(tmp_path):
    config = made(tmp_path)
    (tmp_path / "out").mkdir()
    for content in ("[1]", "{}", "{", '{"name": 5}'):
        (tmp_path / "out" / "summary.json").write_text(content)
        with pytest.raises(StorageError, match=r"summary\.json|holds run"):
            check_config(config)
    (tmp_path / "out" / "summary.json").write_text('{"name": "mine"}')
    check_config(config)


def test_checks_name_the_alternatives_in_one_line(tmp_path):
    with pytest.raises(ConfigError) as caught:
        check_config(made(tmp_path, student={"shape": {"model_type": "lama"}}))
    assert "student.shape" in str(caught.value)
    assert "\n" not in str(caught.value)


# --- corpus files that are unusual and fine, or fine-looking and wrong ------------------------------------------------


def texts_of(path):
    config = DataConfig(sources=["x"])
    sources = find_sources([str(path)])
    return [text for source in sources for batch in read_documents(source, config) for text in batch.documents]


def test_corpus_file_name_with_spaces_and_signs_is_found(tmp_path):
    path = tmp_path / "my 100% corpus #1.jsonl"
    path.write_text('{"text": "a"}\n')
    assert texts_of(path) == texts_of(tmp_path) == ["a"]


def test_corpus_with_byte_order_mark_and_blank_lines_is_read(tmp_path):
    (tmp_path / "a.jsonl").write_bytes(b"\xef\xbb\xbf" + b'{"text": "a"}\r\n\r\n\n{"text": "b"}')
    (tmp_path / "b.txt").write_bytes(b"\xef\xbb\xbfc")
    assert texts_of(tmp_path) == ["a", "b", "c"]


def test_corpus_of_several_gzip_members_is_read_to_its_end(tmp_path):
    (tmp_path / "a.jsonl.gz").write_bytes(gzip.compress(b'{"text": "a"}\n') + gzip.compress(b'{"text": "b"}\n'))
    assert texts_of(tmp_path) == ["a", "b"]


def test_corpus_parquet_column_that_is_no_text_is_refused(tmp_path):
    pq.write_table(pa.table({"text": [1, 2]}), tmp_path / "a.parquet")
    with pytest.raises(CorpusError, match=r"a\.parquet: column 'text' holds int64, not text; set data\.text_column"):
        texts_of(tmp_path)


def test_corpus_parquet_of_large_or_repeated_texts_is_read(tmp_path):
    pq.write_table(pa.table({"text": pa.array(["a"], pa.large_string())}), tmp_path / "a.parquet")
    pq.write_table(pa.table({"text": pa.array(["b", "b"]).dictionary_encode()}), tmp_path / "b.parquet")
    pq.write_table(pa.table({"text": pa.array(["c", None])}), tmp_path / "c.parquet")
    assert texts_of(tmp_path) == ["a", "b", "b", "c"]
