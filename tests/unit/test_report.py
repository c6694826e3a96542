"""The report: every model and every figure is on the page, and nothing on it is fetched from anywhere."""

import re
from html.parser import HTMLParser

import pytest

from jobs.config import RunConfig
from jobs.evaluating.compression import with_compression
from jobs.evaluating.plots import PALETTE, Point, scatter
from jobs.evaluating.report import render_report
from jobs.tables import title

CONFIG = RunConfig.model_validate(
    {
        "name": "mine",
        "storage": "s3://bucket/mine",
        "data": {"sources": ["s3://bucket/<corpus>/"], "sequence_length": 64},
        "teacher": {"model": "/models/teacher"},
        "student": {"from_teacher": {"layers": [0, 2]}},
        "train": {"steps": 3},
    }
)
KEYS = {"prepare": "p0", "teacher": "t0", "train": "s0", "evaluate": "e0", "quantize": "q0"}
MACHINE = {"processor": "Sample CPU", "threads": "2", "system": "Linux x86_64", "python": "3.11.7", "torch": "2.13"}
NAMES = ["teacher", "student", "student_int8_weight_only", "student_onnx_int8"]


def figures(number):
    """Figures of a model of which no two are written alike."""
    quality = {"bits_per_byte": 1.1111, "perplexity": 22.22, "kl_to_teacher": 0.3333, "agreement": 0.4444}
    out = {name: value + number / 100 for name, value in quality.items() if number or value > 1}
    for name, value in list(out.items()):
        out |= {f"{name}_low": value - 0.0101 * (number + 1), f"{name}_high": value + 0.0202 * (number + 1)}
    return {
        **out,
        "rows": 100 + number,
        "positions": 5000 + number,
        "parameters": 7_000_001 - number,
        "bytes": 8_100_000 - 1_000_000 * number,
        "peak_memory_bytes": 500_000_000 + 1_000_000 * number,
        "base_memory_bytes": 270_000_000,
        "prompt_tokens": 48,
        "flops_per_token": 1.23e9 + 1e7 * number,
        "first_token_s": 0.0711 + number / 1000,
        "token_s": 0.00612 + number / 10000,
        "tokens_per_s_batch_1": 9_001 + number,
        "tokens_per_s_batch_8": 19_001 + number,
        "tokens_per_s": 19_001 + number,
        "timings": 6 + number,
        "first_token_s_low": 0.0701 + number / 1000,
        "first_token_s_high": 0.0731 + number / 1000,
        "token_s_low": 0.00602 + number / 10000,
        "token_s_high": 0.00632 + number / 10000,
        "tokens_per_s_batch_8_low": 18_001 + number,
        "tokens_per_s_batch_8_high": 20_001 + number,
        "joules_per_token": 0.0123 + number / 1000,
        "task/quiz/acc": 0.61 + number / 100,
        "task/quiz/acc_norm": 0.71 + number / 100,
        "task/quiz/chance": 0.25,
        "task/quiz/questions": 40,
    }


def subjects(number):
    score = {"questions": 40, "chance": 0.25, "acc": 0.61 + number / 100, "acc_stderr": 0.0712}
    score |= {"acc_norm": 0.71 + number / 100, "acc_norm_stderr": 0.0613}
    return {"": score, "world_history": {"questions": 1, "chance": 0.25, "acc": 1.0, "acc_norm": 0.0}}


def outputs(quantised=True, teacher=True):
    models = {name: figures(number) for number, name in enumerate(NAMES)}
    if not teacher:
        del models["teacher"]
    models = with_compression(models, models.get("teacher"))

    def stage(names):
        chosen = [name for name in names if name in models]
        return {
            "models": {name: models[name] for name in chosen},
            "details": {
                "measured_at": "2026-11-21T10:00:00+00:00",
                "machine": {**MACHINE, "transformers": "5.23"},
                "absent": {name: {} for name in chosen},
                "teacher_bits_per_byte_in_training": 1.0,
                "agreement_by_position": {
                    name: [[0, 31, 0.4, 90], [32, 63, 0.5, 80]] for name in chosen if name != "teacher" and teacher
                },
                "tasks": {"quiz": {name: subjects(NAMES.index(name)) for name in chosen}},
            },
        }

    out = {
        "prepare": {"fingerprint": "corpusprint", "tokenizer_fingerprint": "tokenizerprint"},
        "train": {
            "losses": [3.0, 2.0, 1.5],
            "cross_entropies": [3.5, 3.0, 2.5],
            "divergences": [2.5, 1.5, 1.0],
            "validation": [[1, 2.5], [3, 2.0]],
            "parts_s": {"data": 1.0, "wait": 2.0, "forward": 3.0, "loss": 2.0, "backward": 1.0, "optimizer": 1.0},
            "train_s": 12.0,
        },
        "evaluate": stage(NAMES[:2]),
    }
    return {**out, "quantize": stage(NAMES[2:])} if quantised else out


class Page(HTMLParser):
    """Cells of every table by row, ids, and what would be fetched; refuses elements that are not closed."""

    def __init__(self, html):
        super().__init__()
        self.rows, self.ids, self.fetched, self.open, self.images = [], [], [], [], []
        self.feed(html)
        assert self.open == []

    def handle_starttag(self, tag, attributes):
        found = dict(attributes)
        self.ids += [found["id"]] if "id" in found else []
        self.fetched += [value for name, value in found.items() if name in ("src", "data", "action", "srcset")]
        self.fetched += [value for name, value in found.items() if name.endswith("href") and not value.startswith("#")]
        if tag == "svg":
            self.images.append(found.get("aria-label"))
        if tag == "tr":
            self.rows.append([])
        elif tag in ("td", "th"):
            self.rows[-1].append("")
        if tag not in ("meta", "link", "br", "img"):
            self.open.append(tag)

    def handle_startendtag(self, tag, attributes):
        self.handle_starttag(tag, attributes)
        self.open.pop()

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        if {"td", "th"} & set(self.open):
            self.rows[-1][-1] += data.strip() + " "


def test_report_has_every_model_with_every_figure():
    page = Page(render_report(CONFIG, outputs(), KEYS))
    for number, name in enumerate(NAMES):
        cells = " ".join(cell for row in page.rows if row[0].strip() == title(name) for cell in row)
        f = figures(number)
        expected = [f"{f['bits_per_byte']:.4f}", f"{f['bits_per_byte_low']:.4f} to {f['bits_per_byte_high']:.4f}"]
        expected += [f"{f['perplexity']:.2f}", f"{f['positions']:,} tokens", f"{f['rows']} rows"]
        if number:
            expected += [f"{f['kl_to_teacher']:.4f}", f"{f['kl_to_teacher_low']:.4f} to", f"{f['agreement']:.2%}"]
        expected += [
            f"{f['parameters']:,}",
            f"{8.1 - number:.1f} MB",
            f"{500 + number}.0 MB",
            f"{1.23 + number / 100:.3g} G",
        ]
        expected += [f"{71.1 + number:.1f}", f"{6.12 + number / 10:.2f}", f"{9001 + number:,}", f"{19001 + number:,}"]
        expected += [f"{6 + number} timings", f"{70.1 + number:.1f} to {73.1 + number:.1f}"]
        expected += [
            f"{6.02 + number / 10:.2f} to {6.32 + number / 10:.2f}",
            f"{18001 + number:,} to {20001 + number:,}",
        ]
        expected += [f"{0.0123 + number / 1000:.3g}", f"{8.1 / (8.1 - number):.2f} ×"]
        expected += [f"{100 * 1.1111 / f['bits_per_byte']:.1f} %", f"{100 * (0.36 + number / 100) / 0.36:.1f} %"]
        for text in expected:
            assert text in cells, (name, text)
    quiz = next(row for row in page.rows if row[0].strip() == "all")
    for number in range(4):
        assert f"{61 + number}.0% ± 7.1%" in quiz[3 + number]
        assert f"norm {71 + number}.0% ± 6.1%" in quiz[3 + number]
    assert [" ".join(cell.split()) for row in page.rows if row[0].strip() == "world history" for cell in row[:4]] == [
        "world history",
        "1",
        "25.0%",
        "100.0% norm 0.0%",
    ]


def test_report_says_what_was_measured_where_and_with_what():
    html = render_report(CONFIG, outputs(), KEYS)
    for text in ("2026-11-21T10:00:00+00:00", "Sample CPU, Linux x86_64; 2 threads", "corpusprint", "tokenizerprint"):
        assert text in html
    assert "python 3.11.7, torch 2.13, transformers 5.23<" in html
    for text in ("stage train s0", "stage quantize q0", "s3://bucket/mine", "sequence_length: 64", "<h1>mine"):
        assert text in html


def test_report_names_both_machines_where_stages_ran_on_two():
    found = outputs()
    found["quantize"]["details"]["machine"] = {**MACHINE, "processor": "Other CPU", "threads": "8"}
    html = render_report(CONFIG, found, KEYS)
    assert "Sample CPU, Linux x86_64; 2 threads and Other CPU, Linux x86_64; 8 threads" in html


def test_report_of_figures_without_intervals_leaves_their_place_empty():
    found = outputs()
    for models in (found["evaluate"]["models"], found["quantize"]["models"]):
        for of_model in models.values():  # as an older record has them
            for name in [name for name in of_model if "_s" in name and name.endswith(("_low", "_high"))]:
                del of_model[name]
            del of_model["timings"]
    assert "timings" not in " ".join(cell for row in Page(render_report(CONFIG, found, KEYS)).rows for cell in row)


def test_report_needs_nothing_from_outside_and_no_script():
    html = render_report(CONFIG, outputs(), KEYS)
    assert not re.search(r"https?://|//[a-z]+\.[a-z]|url\((?!#)|@import", html.replace("s3://bucket", ""))
    page = Page(html)
    assert page.fetched == []
    assert "<script" not in html
    assert "default-src 'none'" in html
    assert len(page.ids) == len(set(page.ids))
    for reference in re.findall(r'(?:href="#|url\(#)([^")]+)', html):
        assert reference in page.ids


def test_report_escapes_what_a_config_says():
    html = render_report(CONFIG, outputs(), KEYS)
    assert "<corpus>" not in html
    assert "&lt;corpus&gt;" in html


def test_report_plots_follow_the_colours_of_the_page():
    html = render_report(CONFIG, outputs(), KEYS)
    body = html[html.index("<main>") :]
    assert not re.findall(r"(?:fill|stroke): #[0-9a-f]{6}", body)
    for variable in set(PALETTE.values()):
        assert f"{variable[4:-1]}:" in html
    assert Page(html).images == [
        "Quality against size",
        "Quality against latency",
        "Agreement with the teacher by place in the row",
        "Training loss and held-out bits per byte over the steps",
        "Where the time of a training step goes",
    ]


def test_report_shows_the_teacher_in_training_on_the_same_rows_or_not_at_all():
    assert ">teacher, same rows</text>" in render_report(CONFIG, outputs(), KEYS)
    found = outputs()
    del found["evaluate"]["details"]["teacher_bits_per_byte_in_training"]
    assert "teacher, same rows" not in render_report(CONFIG, found, KEYS)


def test_report_after_evaluate_has_the_float_models_alone():
    html = render_report(CONFIG, outputs(quantised=False), KEYS)
    assert "student int8" not in html
    assert len(Page(html).images) == 5


def test_report_without_a_teacher_compares_with_none():
    html = render_report(CONFIG, outputs(teacher=False), KEYS)
    assert "Compared with the teacher" not in html
    assert "Agreement with the teacher by place" not in html


def test_report_says_what_is_absent_and_why():
    found = outputs()
    del found["quantize"]["models"]["student_onnx_int8"]["joules_per_token"]
    found["quantize"]["details"]["absent"]["student_onnx_int8"] = {"joules_per_token": "no counters <here>"}
    html = render_report(CONFIG, found, KEYS)
    assert "[1] J per token: absent, no counters &lt;here&gt;" in html
    assert html.count("– [1]") == 1


def test_plot_of_a_single_model_and_of_far_apart_ones_is_drawn():
    for points in ([Point("a", 1.0, 2.0)], [Point("a", 0.001, 2.0, 1.9, 2.2), Point("b", 50_000.0, 1.0)]):
        svg = scatter("x", points, "size", "quality", "a plot")
        assert svg.startswith("<svg")
        for point in points:
            assert f">{point.name}</text>" in svg


def test_compression_is_against_the_teacher():
    teacher = {"bytes": 100, "parameters": 50, "bits_per_byte": 1.0, "task/q/acc": 0.75, "task/q/chance": 0.25}
    model = {"bytes": 40, "parameters": 10, "bits_per_byte": 1.25, "task/q/acc": 0.5, "task/q/chance": 0.25}
    found = with_compression({"teacher": teacher, "student": model}, teacher)
    added = {name: found["student"][name] for name in found["student"].keys() - model.keys()}
    assert added == pytest.approx(
        {"size_ratio": 2.5, "parameter_ratio": 5, "retention_percent": 80, "task/q/retention_percent": 50}
    )
    assert found["teacher"]["retention_percent"] == 100
    guessing = {**teacher, "task/q/acc": 0.25}
    assert "task/q/retention_percent" not in with_compression({"student": model}, guessing)["student"]
    assert with_compression({"student": model}, None) == {"student": model}


def test_loss_is_drawn_with_its_parts_where_a_teacher_had_one():
    html = render_report(CONFIG, outputs(), KEYS)
    for name in ("objective", "against the text", "against the teacher"):
        assert f">{name}</text>" in html
    alone = outputs()
    alone["train"] |= {"divergences": []}
    assert ">objective</text>" not in render_report(CONFIG, alone, KEYS)
