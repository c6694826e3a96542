"""Training for 4 bits: it learns, what it rounded to is what is stored, and the artefact is as small as 4 bits are."""

import json

import numpy as np
import onnx
import pytest
import torch
from onnx import numpy_helper

from cluster.language_model import load_causal_lm
from cluster.storage import open_storage
from jobs.evaluating.scorers import load_scorer, model_bytes
from jobs.quantization import int4_qat, onnx_int4
from jobs.quantization.config import QatConfig
from jobs.quantization.int4_qat import TRAINING, QatPlan, quantize
from jobs.training.data import ExampleStore, collate
from jobs.training.objective import Objective
from tests import tiny
from tests.unit.test_training_loop import prepared

__all__ = ["prepared"]
SIZE = {"hidden_size": 64, "intermediate_size": 256}


def plan(root, teacher, **changes):
    config = QatConfig(**{"steps": 24, "batch_rows": 4, "learning_rate": 1e-3, **changes})
    return QatPlan(teacher, str(root), "store/x", Objective(0.0), config)


@pytest.fixture(scope="module")
def student(tmp_path_factory):
    model = tiny.model("llama_tied", 3, **SIZE)
    with torch.no_grad():
        for layer in model.model.layers:
            for module in layer.modules():
                if isinstance(module, torch.nn.Linear):
                    module.weight.mul_(8)  # so that what is rounded matters beside the embedding
    directory = tmp_path_factory.mktemp("student") / "m"
    model.save_pretrained(directory)
    tiny.tokenizer(directory)
    return directory


@pytest.fixture(scope="module")
def trained(prepared, student, tmp_path_factory):
    """The float student is the teacher: what rounding took is what there is to learn."""
    root, _ = prepared
    made, reports = tmp_path_factory.mktemp("made"), []
    quantize(str(student), made, plan(root, str(student)), lambda step, loss: reports.append((step, loss)))
    return root, student, made, reports


def test_qat_brings_the_rounded_student_nearer_to_its_teacher(trained, tmp_path):
    root, student, made, reports = trained
    onnx_int4.quantize(str(student), tmp_path / "rounded")
    store = ExampleStore(open_storage(str(root)), "store/x", "validation")
    batch = collate([store.row(index) for index in range(min(4, len(store)))])

    def divergence(model, scheme):
        wanted, found = (
            torch.log_softmax(load_scorer(str(place), kind, 1).logits(batch), -1)
            for place, kind in ((student, "float"), (model, scheme))
        )
        return torch.nn.functional.kl_div(found, wanted, log_target=True, reduction="batchmean").item()

    assert divergence(made, "int4_qat") < 0.85 * divergence(tmp_path / "rounded", "onnx_int4")
    assert [step for step, _ in reports] == list(range(1, 25))
    assert np.mean([loss for _, loss in reports[-3:]]) < np.mean([loss for _, loss in reports[:3]])
    facts = json.loads((made / TRAINING).read_text())
    assert (facts["steps"], facts["steps_asked"], facts["last_loss"]) == (24, 24, reports[-1][1])


def test_qat_artefact_holds_two_weights_in_a_byte(trained):
    _, student, made, _ = trained
    graph = onnx.load(made / "model.onnx").graph
    held = {item.name: numpy_helper.to_array(item) for item in graph.initializer}
    nodes = [node for node in graph.node if node.op_type == "MatMulNBits"]
    bits = [next(field.i for field in node.attribute if field.name == "bits") for node in nodes]
    assert sorted(bits) == [4] * 14 + [8]  # seven layers in each of two blocks, and the head
    packed = sum(held[node.input[1]].nbytes for node, width in zip(nodes, bits, strict=True) if width == 4)
    exact = load_causal_lm(str(student))
    weights = sum(
        module.weight.numel() for name, module in exact.model.named_modules() if isinstance(module, torch.nn.Linear)
    )
    assert packed == weights / 2
    [embedding] = [node for node in graph.node if node.op_type == "GatherBlockQuantized"]
    head = nodes[bits.index(8)]
    assert embedding.input[0] == head.input[1]  # tied: the same bytes
    assert model_bytes(str(made)) < 0.25 * model_bytes(str(student)) + 60_000


def test_qat_that_takes_too_long_stops_with_what_it_has(prepared, student, caplog):
    root, _ = prepared
    wanted = plan(root, str(student), max_minutes=1e-9)
    assert len(int4_qat.fine_tune(load_causal_lm(str(student)), wanted, lambda step, loss: None)) == 1
    assert "int4_qat stopped after 1 of 24 steps" in caplog.text


def test_qat_is_the_same_for_the_same_seed_and_follows_the_teacher(prepared, student):
    root, teacher = prepared
    losses = []
    for wanted in (plan(root, teacher, steps=3), plan(root, teacher, steps=3), plan(root, str(student), steps=3)):
        losses.append(int4_qat.fine_tune(load_causal_lm(str(student)), wanted, lambda step, loss: None))
    assert losses[0] == losses[1] != losses[2]
    assert losses[2][0] == pytest.approx(0, abs=0.01)  # unrounded, the student is its own teacher
