"""Encoders and classifiers: every scheme that goes with them, beside labels, without a run."""

import json
from pathlib import Path

import numpy as np
import pyarrow.parquet
import pytest
import torch
import transformers
from rich.console import Console
from sklearn.metrics import accuracy_score, f1_score
from typer.testing import CliRunner

from cluster.errors import ConfigError, CorpusError, ModelError
from jobs import quantize_encoder as job
from jobs.__main__ import app
from jobs.evaluating.classification import classification_figures
from jobs.evaluating.encoder_report import render_encoder_report
from jobs.evaluating.similarity import similarity_figures
from jobs.quantization import int8_dynamic, int8_weight_only, onnx_int8
from jobs.quantization.encoder_scorer import EncoderScorer
from jobs.tables import encoders_table
from services.endpoint.encoders import EncoderModel
from tests import encoder_models, tiny
from tests.unit.test_report import Page

ROWS = [[5, 9, 11, 30, 2], [7, 8], [1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11]]
MAKERS = {"int8_weight_only": int8_weight_only, "int8_dynamic": int8_dynamic, "onnx_int8": onnx_int8}


def save_encoder(directory, family="bert", kind="AutoModelForSequenceClassification"):
    """A random encoder whose outputs differ much from text to text, with the tiny tokenizer."""
    special = {"dim": 64, "hidden_dim": 256, "n_layers": 2, "n_heads": 2} if family == "distilbert" else {}
    config = transformers.AutoConfig.for_model(
        family,
        vocab_size=tiny.VOCABULARY,
        num_labels=3,
        pad_token_id=0,
        **special
        or {
            "hidden_size": 64,
            "intermediate_size": 256,
            "num_hidden_layers": 2,
            "num_attention_heads": 2,
            "max_position_embeddings": 130,
        },
    )
    torch.manual_seed(1)
    model = getattr(transformers, kind).from_config(config).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() > 1:
                parameter.mul_(4)
    model.save_pretrained(directory)
    tiny.tokenizer(directory)
    return directory


@pytest.mark.parametrize(
    ("family", "kind", "shape"),
    [
        ("bert", "AutoModelForSequenceClassification", (3, 3)),
        ("distilbert", "AutoModel", (3, 11, 64)),
        ("roberta", "AutoModelForMaskedLM", (3, 11, 64)),
    ],
)
def test_encoder_quantised_by_every_scheme_stays_near_float(tmp_path, family, kind, shape):
    student = save_encoder(tmp_path / "m", family, kind)
    exact = EncoderScorer(student, "float", 1).outputs(ROWS).numpy()
    for scheme, maker in MAKERS.items():
        maker.quantize(str(student), tmp_path / scheme)
        found = EncoderScorer(tmp_path / scheme, scheme, 1).outputs(ROWS).numpy()
        assert found.shape == exact.shape == shape
        seen = [(slice(None),)] if len(shape) == 2 else [(row, slice(0, len(ids))) for row, ids in enumerate(ROWS)]
        error = max(np.abs(found[place] - exact[place]).max() for place in seen)
        assert 0 < error < 0.1 * np.abs(exact).max(), scheme


def test_half_of_t5_that_reads_is_quantised_and_served(tmp_path):
    size = {"d_model": 64, "d_kv": 32, "d_ff": 128, "num_layers": 2, "num_heads": 2}
    torch.manual_seed(1)
    model = transformers.T5EncoderModel(transformers.T5Config(vocab_size=tiny.VOCABULARY, **size))
    model.save_pretrained(tmp_path / "model")
    tiny.tokenizer(tmp_path / "model")
    written = tmp_path / "model" / "config.json"  # as sentence-transformers publishes such models
    written.write_text(json.dumps({**json.loads(written.read_text()), "is_encoder_decoder": True}))
    modules = [{"type": "sentence_transformers.models.Pooling", "path": "1_Pooling"}]
    (tmp_path / "model" / "modules.json").write_text(json.dumps(modules))
    (tmp_path / "model" / "1_Pooling").mkdir()
    (tmp_path / "model" / "1_Pooling" / "config.json").write_text('{"pooling_mode_mean_tokens": true}')
    made = job.make_artefact(tmp_path / "model", tmp_path / "made", "onnx_int8", ROWS, 1)
    exact = EncoderScorer(tmp_path / "model", "float", 1).outputs(ROWS)
    for row, ids in enumerate(ROWS):
        assert (made - exact)[row, : len(ids)].abs().max() < 0.05 * exact.abs().max()
    assert EncoderModel(tmp_path / "made", "embeddings", 64).dimensions == 64


def test_encoder_command_measures_each_scheme_in_a_fresh_process(tmp_path, forked_raystill):
    student = save_encoder(tmp_path / "m")
    texts = tiny.sentences(40)
    encoded = job.read_texts(student, texts)
    logits = torch.cat([EncoderScorer(student, "float", 1).outputs([ids]) for ids in encoded])
    model = transformers.AutoModelForSequenceClassification.from_pretrained(student)
    with torch.no_grad():
        model.classifier.bias -= logits.mean(0)
    model.save_pretrained(student)
    labels = (logits - logits.mean(0)).argmax(1).tolist()  # what the float model says, which is not always the same
    assert len(set(labels)) == 3
    rows = tmp_path / "rows.jsonl"
    lines = [json.dumps({"text": text, "label": label}) for text, label in zip(texts, labels, strict=True)]
    rows.write_text("\n".join(lines))
    arguments = ["quantize-encoder", student, tmp_path / "made", "--rows", rows, "--scheme", "onnx_int8"]
    done = forked_raystill(*arguments, "--label-column", "label", "--json", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout.splitlines()[-1])
    assert set(found) == {"float", "onnx_int8"}
    assert (found["float"]["accuracy"], found["float"]["macro_f1"], found["float"]["num_rows"]) == (1.0, 1.0, 40)
    assert found["onnx_int8"]["accuracy"] >= 0.9
    assert found["onnx_int8"]["reload_error"] == 0
    assert found["onnx_int8"]["bytes"] < found["float"]["bytes"]
    assert 0.99 < found["onnx_int8"]["similarity"] < 1
    page = (tmp_path / "made/report.html").read_text()
    for text in (str(student), "Quality on rows with labels", "40 rows", "3 labels", "6 timings", "1.0000"):
        assert text in page
    for figure in ("accuracy_low", "macro_f1", "macro_f1_high"):
        assert f"{found['onnx_int8'][figure]:.4f}" in page
    manifest = json.loads((tmp_path / "made/onnx_int8/manifest.json").read_text())
    assert manifest["scheme"] == "onnx_int8"
    assert {"model.onnx", "config.json", "tokenizer.json"} <= set(manifest["files"])


def test_texts_are_measured_as_the_endpoint_reads_them(tmp_path):
    encoder_models.save_encoder(tmp_path / "plain")
    encoder_models.save_encoder(tmp_path / "sentences", {"pooling_mode_mean_tokens": True})
    prompts = {"prompts": {"query": "red hat "}, "default_prompt_name": "query"}
    (tmp_path / "sentences/config_sentence_transformers.json").write_text(json.dumps(prompts))
    texts = ["the cat sat", "the cat " * 31, "the cat " * 200, "the cat " * 20 + "☃ " * 50]
    for name, limit in (("plain", 64), ("sentences", 32)):
        model = EncoderModel(tmp_path / name, "embeddings", 2048)
        found = job.read_texts(tmp_path / name, texts)
        assert found == [model.encode(text, truncate=True) for text in texts]
        assert [len(ids) for ids in found[2:]] == [limit, limit]
        ends = [(ids[0], ids[-1]) for ids in found]
        assert set(ends) == {(model.tokenizer.cls_token_id, model.tokenizer.sep_token_id)}
    # What is cut off is the end of the text, be its words known or not.
    uncut = model.tokenizer.encode("red hat " + texts[3])
    assert found[3] == [*uncut[:31], model.tokenizer.sep_token_id]


def test_encoder_command_refuses_before_any_work(tmp_path):
    decoder, encoder = tiny.save_model(tmp_path / "d"), save_encoder(tmp_path / "e")
    with pytest.raises(ConfigError, match=r"llama that generates: quantise it with `raystill quantize`"):
        job.quantize_encoder(str(decoder), tmp_path / "made", ["onnx_int8"], ["text"])
    (tmp_path / "t5").mkdir()
    both = transformers.AutoConfig.for_model("t5", architectures=["T5ForConditionalGeneration"])
    both.save_pretrained(tmp_path / "t5")
    (tmp_path / "t5/model.safetensors").write_bytes(b"never read")
    with pytest.raises(ConfigError, match=r"t5, whose encoder and decoder are two models in one"):
        job.quantize_encoder(str(tmp_path / "t5"), tmp_path / "made", ["onnx_int8"], ["text"])
    with pytest.raises(
        ConfigError, match=r"--scheme has int4_qat, the model is a bert: .*next tokens.*: take onnx_int8$"
    ):
        job.quantize_encoder(str(encoder), tmp_path / "made", ["onnx_int8", "int4_qat"], ["text"])
    with pytest.raises(ConfigError, match=r"--scheme has compressed_tensors_w4a16, .*GPTQ is for decoders: take onnx"):
        job.quantize_encoder(str(encoder), tmp_path / "made", ["compressed_tensors_w4a16"], ["text"])
    with pytest.raises(ConfigError, match=r"--scheme: schemes.0: found 'int3'"):
        job.quantize_encoder(str(encoder), tmp_path / "made", ["int3"], ["text"])
    assert not (tmp_path / "made").exists()


def test_place_that_cannot_be_a_directory_is_refused_before_any_work(tmp_path):
    encoder = save_encoder(tmp_path / "e")
    (tmp_path / "file").write_text("somebody's")
    with pytest.raises(ConfigError, match=r"file: cannot be a directory .*: name another INTO"):
        job.quantize_encoder(str(encoder), tmp_path / "file", ["onnx_int8"], ["text"])
    assert (tmp_path / "file").read_text() == "somebody's"


@pytest.mark.parametrize(
    ("content", "columns", "words"),
    [
        (None, ("text", "label"), "cannot be read"),
        ('{"text": "a", "label": 0}', ("sentence", "label"), "no column 'sentence'; found text, label"),
        ('{"text": "a", "label": 1.5}', ("text", "label"), "label holds 1.5; expected whole numbers"),
        ('{"text": "a", "label": -1}', ("text", "label"), "label holds -1"),
        ('{"text": "a", "label": true}', ("text", "label"), "label holds True; expected whole numbers"),
        (
            '{"text": "a", "label": 0}\n{"text": null, "label": 1}',
            ("text", None),
            "row 1: text holds None; expected a text",
        ),
        ('{"text": ["a", "b"]}', ("text", None), r"row 0: text holds \['a', 'b'\]; expected a text"),
        ('{"text": "\\ud83d"}', ("text", None), r"row 0: text holds '\\ud83d'; expected a text"),
        ('{"text": "a"}\n{"text": ', ("text", None), "line 2 is not JSON"),
        ('"a"', ("text", None), "line 1 is no JSON object"),
        ("\n", ("text", None), "no rows in it"),
    ],
)
def test_rows_that_cannot_be_read_are_named(tmp_path, content, columns, words):
    path = tmp_path / "rows.jsonl"
    if content is not None:
        path.write_text(content)
    with pytest.raises(CorpusError, match=words):
        job.read_rows(path, *columns, 10)


def test_rows_behind_the_last_and_columns_that_were_not_asked_for_are_not_read(tmp_path, monkeypatch):
    path = tmp_path / "rows.jsonl"
    path.write_text('{"text": "2020-01-01", "label": 1}\n{"text": "b", "label": 0}\nnot JSON at all')
    assert job.read_rows(path, "text", "label", 2) == (["2020-01-01", "b"], [1, 0])
    texts = [str(number) for number in range(5000)]
    table = pyarrow.table({"text": texts, "label": [0, None] * 2500, "large": [b"..."] * 5000})
    pyarrow.parquet.write_table(table, tmp_path / "rows.parquet")
    read, kept = [], pyarrow.parquet.ParquetFile.iter_batches

    def batches(*args, **options):
        for batch in kept(*args, **options):
            read.append((batch.num_rows, batch.schema.names))
            yield batch

    monkeypatch.setattr(pyarrow.parquet.ParquetFile, "iter_batches", batches)
    assert job.read_rows(tmp_path / "rows.parquet", "text", None, 1500) == (texts[:1500], None)
    assert [names for _, names in read] == [["text"]] * len(read)
    assert 1500 <= sum(rows for rows, _ in read) < 5000
    with pytest.raises(CorpusError, match="row 1: label holds None"):
        job.read_rows(tmp_path / "rows.parquet", "text", "label", 2)
    with pytest.raises(CorpusError, match="no column 'sentence'; found text, label, large"):
        job.read_rows(tmp_path / "rows.parquet", "sentence", None, 2)


@pytest.mark.parametrize(
    ("family", "architecture", "words"),
    [
        ("bert", "BertForQuestionAnswering", "whose head the endpoint does not serve"),
        ("bert", "BertForPreTraining", "whose head the endpoint does not serve"),
        ("bert", "BertForMultipleChoice", "whose head the endpoint does not serve"),
        ("bert", "BertForTokenClassification", "a BertForTokenClassification, whose head the endpoint does not serve"),
        ("gpt2", "GPT2ForSequenceClassification", "is a gpt2, whose layers are Conv1D"),
        (
            "llama",
            "LlamaForSequenceClassification",
            "pad_token_id None, so a batch's shorter texts cannot be filled up",
        ),
        ("bert", "BertForSequenceClassification", "problem_type=regression"),
    ],
)
def test_encoder_that_the_endpoint_would_not_serve_is_refused_before_any_work(tmp_path, family, architecture, words):
    more = {"problem_type": "regression"} if "regression" in words else {}
    config = transformers.AutoConfig.for_model(family, architectures=[architecture], **more)
    config.save_pretrained(tmp_path / "m")
    tiny.tokenizer(tmp_path / "m")
    (tmp_path / "m/model.safetensors").write_bytes(b"never read")
    with pytest.raises((ConfigError, ModelError), match=words):
        job.quantize_encoder(str(tmp_path / "m"), tmp_path / "made", ["onnx_int8"], ["text"])
    assert not (tmp_path / "made").exists()


def test_labels_of_a_classifier_are_looked_at_before_any_work_and_its_modules_are_not(tmp_path):
    encoder_models.save_classifier(tmp_path / "m")
    modules = [{"type": "sentence_transformers.models.Transformer", "path": ""}]
    (tmp_path / "m/modules.json").write_text(
        json.dumps(modules)
    )  # without a Pooling, which a classifier has no use for
    with pytest.raises(CorpusError, match=r"row 1: its label is 3, .* has the labels 0 to 2"):
        job.quantize_encoder(str(tmp_path / "m"), tmp_path / "made", ["onnx_int8"], ["the", "cat", "sat"], [2, 3, 0])
    assert not (tmp_path / "made").exists()


@pytest.mark.parametrize("scheme", ["float", "onnx_int8"])
def test_classifier_of_a_decoders_kind_reads_each_text_to_its_own_end(tmp_path, scheme):
    config = transformers.AutoConfig.for_model(
        "llama",
        vocab_size=tiny.VOCABULARY,
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=2,
        pad_token_id=1,
        num_labels=3,
        initializer_range=0.5,
    )
    torch.manual_seed(0)
    transformers.AutoModelForSequenceClassification.from_config(config).save_pretrained(tmp_path / "m")
    tiny.tokenizer(tmp_path / "m")  # which names no padding
    if scheme == "onnx_int8":
        onnx_int8.quantize(str(tmp_path / "m"), tmp_path / "m")
    scorer = EncoderScorer(tmp_path / "m", scheme, 1)
    rows = [[5, 9, 11, 30, 2], [7, 8], [31, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11]]
    alone = torch.cat([scorer.outputs([row]) for row in rows])
    assert (scorer.outputs(rows) - alone).abs().max() < 0.05 * alone.abs().max()
    if scheme == "float":
        model = EncoderModel(tmp_path / "m", "classifications", 64)
        assert np.abs(model.classify(rows, lambda: False) - alone.softmax(-1).numpy()).max() < 1e-5


def test_scheme_that_is_named_again_is_made_once(tmp_path, monkeypatch):
    rows, asked = tmp_path / "rows.jsonl", []
    rows.write_text('{"text": "a"}')

    def quantise(model, into, schemes, texts, labels, threads, report):
        asked.extend(schemes)
        return {}

    monkeypatch.setattr(job, "quantize_encoder", quantise)
    arguments = ["quantize-encoder", "m", "made", "--rows", str(rows), "--json"]
    done = CliRunner().invoke(app, [*arguments, *["--scheme", "onnx_int8", "--scheme", "onnx_int4"] * 2])
    assert done.exit_code == 0, done.output
    assert asked == ["onnx_int8", "onnx_int4"]


def test_encoder_command_says_what_is_wrong_in_one_line(tmp_path, forked_raystill):
    rows = tmp_path / "rows.jsonl"
    rows.write_text('{"text": "a", "label": 0}')
    encoder = save_encoder(tmp_path / "m", kind="AutoModel")
    for options, words in (
        (["--label-column", "label"], "is no classifier, so labels say nothing of it: leave --label-column out"),
        (["--text-column", "sentence"], "no column 'sentence'; found text, label"),
    ):
        done = forked_raystill("quantize-encoder", encoder, "made", "--rows", rows, *options, "--json", cwd=tmp_path)
        assert done.returncode == 2
        assert words in done.stderr
        assert done.stderr.startswith("raystill: ")
        assert len(done.stderr.splitlines()) == 1
        assert words in json.loads(done.stdout.splitlines()[-1])["error"]


def test_encoders_table_has_quality_where_rows_had_labels():
    plain = {name: {"bytes": size, "batch_s": 0.5} for name, size in (("float", 4e6), ("int8_weight_only", 1e6))}
    quality = {"accuracy": 0.9, "accuracy_low": 0.85, "accuracy_high": 0.94, "num_rows": 200, "num_labels": 3}
    quality |= {"macro_f1": 0.88, "macro_f1_low": 0.82, "macro_f1_high": 0.93}
    labelled = {name: figures | quality for name, figures in plain.items()}
    shown = []
    for measured in (plain, labelled):
        console = Console(width=80)
        with console.capture() as capture:
            console.print(encoders_table(measured, Path("made")))
        shown.append(capture.get())
        assert all(text in shown[-1] for text in ("float", "int8_weight_only", "1.0 MB", "0.250", "500.0")), shown
    assert "accuracy" not in shown[0]
    words = ("200 rows with labels, 95 % intervals", "accuracy", "0.9000", "0.850–0.940", "0.8800", "0.820–0.930")
    assert all(text in shown[1] for text in words), shown[1]


def test_encoder_report_has_every_figure_and_needs_nothing_else():
    measured = {
        "float": {"bytes": 4e6, "batch_s": 0.5, "batch_s_low": 0.45, "batch_s_high": 0.65, "timings": 6},
        "int8_weight_only": {"bytes": 1e6, "batch_s": 0.25, "timings": 3, "similarity": 0.98765, "similar_texts": 2},
    }
    quality = {"accuracy": 0.9, "accuracy_low": 0.85, "accuracy_high": 0.94, "num_rows": 200, "num_labels": 3}
    quality |= {"macro_f1": 0.88, "macro_f1_low": 0.82, "macro_f1_high": 0.93}
    machine = {"processor": "Sample CPU", "system": "Linux x86_64", "threads": "2", "torch": "2.13"}
    plain = Page(render_encoder_report("/models/<mine>", measured, 2000, machine))
    rows = {row[0].strip(): " ".join(" ".join(row).split()) for row in plain.rows}
    assert rows["float"] == "float 4.0 MB 1.000 6 timings 500.0 450.0 to 650.0 –"
    assert rows["int8_weight_only"] == "int8_weight_only 1.0 MB 0.250 3 timings 250.0 0.98765"
    labelled = {name: figures | quality for name, figures in measured.items()}
    html = render_encoder_report("/models/<mine>", labelled, 200, machine)
    page = Page(html)
    assert page.fetched == plain.fetched == []
    said = "200 rows 3 labels 0.9000 0.8500 to 0.9400 0.8800 0.8200 to 0.9300"
    assert [" ".join(" ".join(row[1:]).split()) for row in page.rows].count(said) == 2
    for text in ("&lt;mine&gt;: evaluation", "Sample CPU, Linux x86_64; 2 threads", "torch 2.13", "mean over 2 texts"):
        assert text in html
    assert "<h2>" not in html, "neither plots nor the config of a run"


def test_similarity_is_the_cosine_of_what_was_read():
    draw = np.random.default_rng(0)
    exact = draw.normal(size=(3, 5, 8))
    assert similarity_figures(2 * exact, exact, [5, 2, 1]) == pytest.approx(
        {"similarity": 1, "similarity_low": 1, "similarity_high": 1, "similar_texts": 3}
    )
    turned = exact.copy()
    turned[1, 2:], turned[2, 1:] = -9, np.nan  # behind the ends
    turned[0, 0] *= -1
    found = similarity_figures(turned, exact, [5, 2, 1])
    assert found["similarity"] == pytest.approx((0.6 + 1 + 1) / 3)
    assert found["similarity_low"] < found["similarity"] < found["similarity_high"] <= 1
    logits = np.array([[1.0, 0.0], [3.0, 4.0]])
    assert similarity_figures(logits, logits[:, ::-1], [7, 9])["similarity"] == pytest.approx((0 + 24 / 25) / 2)
    assert similarity_figures(logits[:1], logits[:1], [7]) == {"similarity": 1.0, "similar_texts": 1}


def wilson(right, rows, z=1.959964):
    """The two ends, as in Wilson's paper."""
    share, square = right / rows, z * z / rows
    half = z * (share * (1 - share) / rows + square / (4 * rows)) ** 0.5
    return [(share + square / 2 + sign * half) / (1 + square) for sign in (-1, 1)]


@pytest.mark.parametrize(("rows", "labels", "noise"), [(400, 3, 0.8), (60, 5, 2.0), (25, 2, 0.0), (1, 3, 0.0)])
def test_classification_intervals_are_those_of_drawing_rows_anew(rows, labels, noise):
    draw = np.random.default_rng(1)
    true = draw.integers(0, labels, rows)
    logits = np.eye(labels)[true] + noise * draw.normal(size=(rows, labels))
    figures, found = classification_figures(logits, true), logits.argmax(1)
    assert figures.accuracy == pytest.approx(accuracy_score(true, found))
    assert figures.macro_f1 == pytest.approx(f1_score(true, found, average="macro", zero_division=0.0))
    ends = [figures.accuracy_low, figures.accuracy_high]
    assert ends == pytest.approx(wilson(accuracy_score(true, found, normalize=False), rows), abs=1e-6)
    places = [draw.integers(0, rows, rows) for _ in range(400)]
    again = [f1_score(true[place], found[place], average="macro", zero_division=0.0) for place in places]
    expected = np.quantile(again, [0.025, 0.975])
    assert np.abs(np.array([figures.macro_f1_low, figures.macro_f1_high]) - expected).max() < 0.02
    assert figures.macro_f1_low <= figures.macro_f1 <= figures.macro_f1_high


def test_classification_figures_are_those_of_counting():
    logits = np.array([[2.0, 1, 0], [0, 2, 1], [0, 2, 1], [0, 0, 5], [9, 0, 0]])
    figures = classification_figures(logits, np.array([0, 1, 2, 2, 1]))
    # Label 0: precision 1/2, recall 1; label 1: 1/2, 1/2; label 2: 1, 1/2.
    assert figures.accuracy == pytest.approx(3 / 5)
    assert figures.macro_f1 == pytest.approx((2 / 3 + 1 / 2 + 2 / 3) / 3)
    assert (figures.num_rows, figures.num_labels) == (5, 3)
    for labels, words in (([0, 1], "for 2 labels"), ([0, 1, 2, 2, 3], "from 0 to 3"), ([0, 1, 2, 2, -1], "from -1")):
        with pytest.raises(ValueError, match=words):
            classification_figures(logits, np.array(labels))
    with pytest.raises(ValueError, match="finite"):
        classification_figures(np.full((1, 2), np.nan), np.array([0]))
