"""The measuring that `evaluate` and `quantize` share, on a prepared store; speed comes from a process that is not
started here (`test_efficiency` starts one)."""

import io
import json
from types import SimpleNamespace

import numpy as np
import pytest

from cluster.errors import ModelError
from cluster.storage import open_storage
from jobs import evaluate
from jobs.config import EvaluateConfig
from jobs.evaluate import EvaluationPlan, check_and_measure, measure
from jobs.evaluating import efficiency
from jobs.evaluating.efficiency import Efficiency
from jobs.evaluating.questions import read_questions
from jobs.evaluating.scorers import load_scorer, model_bytes
from jobs.evaluating.stage import measured_by
from jobs.quantization import int8_weight_only
from jobs.training.data import ExampleStore, collate
from tests import tiny
from tests.questions import mmlu
from tests.unit.test_training_loop import prepared

__all__ = ["prepared"]
pytestmark = pytest.mark.filterwarnings("ignore")  # lm-eval and its metrics warn on import


@pytest.fixture(autouse=True)
def no_process(monkeypatch):
    """Which rows were given to the processes that measure speed."""
    given = []

    def measured(model, scheme, rows, config, threads):
        given.append(len(rows))
        machine = {"torch": "2", **({"gpu": "Sample GPU"} if len(given) == 1 else {})}  # the first computes on it
        return Efficiency({"parameters": 7, "token_s": 0.5}, {"joules_per_token": "none here"}, machine)

    monkeypatch.setattr(efficiency, "measure_efficiency", measured)
    return given


@pytest.fixture(scope="module")
def student(tmp_path_factory):
    return tiny.save_model(tmp_path_factory.mktemp("student") / "m", seed=3, hidden_size=64)


def plan(prepared, models, **changes):
    root, teacher = prepared
    (root / "quiz.jsonl").write_text("".join(json.dumps(record) + "\n" for record in mmlu()))
    task = {"name": "quiz", "format": "mmlu", "source": str(root / "quiz.jsonl"), "max_questions": 2}
    config = EvaluateConfig(max_rows=6, batch_rows=4, resamples=100, speed_batches=[1, 3], tasks=[task])
    values = {"models": models, "teacher": teacher, "storage": str(root), "store": "store/x", "config": config}
    questions = read_questions(config)
    return EvaluationPlan(**{**values, "threads": 1, "tokenizer": teacher, "questions": questions, **changes})


def test_measure_gives_numbers_for_every_model_and_details_as_json(prepared, student, no_process):
    _, teacher = prepared
    reports = []
    models = {"teacher": (teacher, "float"), "student": (str(student), "float")}
    found = measure(plan(prepared, models), lambda rows, note: reports.append((rows, note)))
    assert json.loads(json.dumps(found)) == found
    assert no_process == [3, 3]  # as many rows as the largest of speed_batches
    for name, figures in found["models"].items():
        assert all(isinstance(value, (int, float)) for value in figures.values())
        assert figures["bytes"] == model_bytes(models[name][0])
        assert (figures["rows"], figures["token_s"], figures["task/quiz/questions"]) == (6, 0.5, 4)
        assert figures["bits_per_byte_low"] < figures["bits_per_byte"] < figures["bits_per_byte_high"]
    assert "kl_to_teacher" not in found["models"]["teacher"]
    assert found["models"]["student"]["kl_to_teacher"] > 0.1
    details = found["details"]
    assert set(details["agreement_by_position"]) == {"student"}
    assert set(details["tasks"]["quiz"]["teacher"]) == {"", "world_history", "algebra"}
    assert details["absent"]["student"] == {"joules_per_token": "none here"}
    assert details["machine"] == {"torch": "2", "gpu": "Sample GPU"}
    taken = measured_by(SimpleNamespace(outputs={"evaluate": found}), "evaluate")
    assert taken["student"] == {**found["models"]["student"], "machine": details["machine"]}
    assert "teacher_bits_per_byte_in_training" not in details
    rows = [measure(plan(prepared, models, questions=[], validation_rows=n), print) for n in (2, 6)]
    seen = [item["details"]["teacher_bits_per_byte_in_training"] for item in rows]
    assert seen[0] != seen[1] == pytest.approx(found["models"]["teacher"]["bits_per_byte"])
    assert (0, "teacher: speed and memory") in reports
    assert (6, "quality") in reports
    assert reports[-1] == (6, "quiz: student 16/16")


def test_measure_of_a_model_does_not_depend_on_what_is_measured_beside_it(prepared, student):
    _, teacher = prepared
    both = measure(plan(prepared, {"teacher": (teacher, "float"), "student": (str(student), "float")}), print)
    alone = measure(plan(prepared, {"student": (str(student), "float")}), print)
    assert set(alone["models"]) == {"student"}
    assert alone["models"]["student"] == pytest.approx(both["models"]["student"])
    without = measure(plan(prepared, {"student": (str(student), "float")}, teacher=None, questions=[]), print)
    of_text = {name for name in alone["models"]["student"] if not name.startswith(("kl", "agreement", "task"))}
    assert set(without["models"]["student"]) == of_text
    assert without["models"]["student"] == pytest.approx({name: alone["models"]["student"][name] for name in of_text})


def test_measure_of_a_model_that_gives_no_numbers_is_an_error_that_names_it(prepared, tmp_path):
    broken = tiny.model("llama", 5)
    broken.model.layers[0].mlp.down_proj.weight.data.fill_(1e20)
    broken.model.norm.weight.data.fill_(1e30)
    broken.save_pretrained(tmp_path / "broken")
    with pytest.raises(ModelError, match=r"broken"):
        measure(plan(prepared, {"student": (str(tmp_path / "broken"), "float")}, questions=[]), print)


def test_artefact_is_compared_with_what_its_maker_saw_and_measured_alike(prepared, student, tmp_path):
    root, _ = prepared
    int8_weight_only.quantize(str(student), tmp_path / "made")
    batch = collate([ExampleStore(open_storage(str(root)), "store/x", "validation").row(0)])
    logits = load_scorer(str(tmp_path / "made"), "int8_weight_only", 1).logits(batch).numpy()

    def probe(name, array):
        buffer = io.BytesIO()
        np.save(buffer, array)
        open_storage(str(tmp_path)).write(name, buffer.getvalue())
        return f"{tmp_path}/{name}"

    class Board:
        class report:  # noqa: N801 - an actor's method as Ray has it
            remote = staticmethod(lambda step, metrics: None)

    this = plan(prepared, {"q": (str(tmp_path / "made"), "int8_weight_only")}, questions=[])
    for array, expected in ((logits, 0), (logits * 1.5, 1 / 3), (logits[1:], np.inf)):
        found = check_and_measure(this, {"q": probe("probe.npy", array)}, Board)
        assert found["models"]["q"]["reload_error"] == pytest.approx(expected, abs=1e-6)
    plain = measure(plan(prepared, {"q": (str(student), "float")}, questions=[]), print)["models"]["q"]
    assert found["models"]["q"]["bits_per_byte"] == pytest.approx(plain["bits_per_byte"], rel=0.01)
    assert found["models"]["q"]["kl_to_teacher"] == pytest.approx(plain["kl_to_teacher"], rel=0.05)
    assert evaluate.TEACHER not in found["models"]


def test_report_that_cannot_be_drawn_costs_a_warning_and_no_figure(tmp_path, monkeypatch, caplog):
    from jobs.evaluating import report
    from jobs.evaluating.stage import REPORT, with_report
    from jobs.stage import Run
    from tests.unit.test_report import CONFIG, KEYS, outputs

    recorded = []
    found = outputs()
    this = Run(CONFIG, open_storage(str(tmp_path)), {**found}, KEYS)
    this.tracker = SimpleNamespace(text=lambda content, name: recorded.append((name, content)))
    output = with_report(this, "quantize", found["quantize"])
    assert output == {**found["quantize"], "report": f"{tmp_path.as_uri()}/report.html"}
    assert recorded == [(REPORT, (tmp_path / REPORT).read_text())]

    def fails(*arguments):
        raise KeyError("no such figure")

    monkeypatch.setattr(report, "render_report", fails)
    assert with_report(this, "quantize", found["quantize"]) == found["quantize"]
    assert "report.html was not written (KeyError: 'no such figure')" in caplog.text
