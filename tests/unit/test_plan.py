"""`raystill plan`: sizes against built models, the arithmetic against figures by hand, and what it refuses."""

import json
import re
from pathlib import Path

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from cluster.config import load
from cluster.errors import ConfigError, ModelError
from jobs.__main__ import app
from jobs.config import RunConfig
from jobs.plan import PlanOptions, plan
from jobs.planning.cards import CARDS, find_card, read_prices
from jobs.planning.sizes import model_sizes
from jobs.planning.table import plan_lines
from tests import tiny

ROOT = Path(__file__).parents[2]
PLANS = sorted((ROOT / "infra" / "plans").glob("*.yaml"))


def config_of(directory, student=None, **parts):
    base = {
        "name": "mine",
        "data": {"sources": ["s3://bucket/corpus"], "sequence_length": 128},
        "teacher": {"model": str(directory)},
        "student": student or {"from_teacher": {"layers": [0]}},
        "train": {"steps": 100, "global_batch": 64, "micro_batch": 8, "num_workers": 2},
    }
    return RunConfig.model_validate({**base, **parts})


@pytest.fixture
def teacher(tmp_path):
    return tiny.save_model(tmp_path / "teacher")


@pytest.mark.parametrize("family", list(tiny.FAMILIES))
def test_size_is_that_of_the_built_model(tmp_path, family):
    directory = tiny.save_model(tmp_path / "teacher", family)
    for path in directory.glob("*.safetensors"):
        path.unlink()  # the config alone says it
    built = tiny.model(family)
    found, _ = model_sizes(config_of(directory))
    assert found.parameters == sum(item.numel() for item in built.parameters())
    assert found.head == built.get_output_embeddings().weight.numel()
    assert found.vocab_size == tiny.VOCABULARY
    tokens = 64
    built.set_attn_implementation("eager")
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        built(input_ids=torch.zeros(1, tokens, dtype=torch.long), use_cache=False)
    # The counter takes attention as if it were not causal: twice ours.
    counted = counter.get_total_flops() / tokens
    assert found.forward_flops(tokens) + 2 * found.attention * tokens == pytest.approx(counted, rel=0.03)


def test_size_of_experts_counts_those_a_token_meets(tmp_path):
    from transformers import AutoConfig

    small = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 2}
    experts = {"num_local_experts": 8, "num_experts_per_tok": 2, "num_key_value_heads": 2, "vocab_size": 320}
    AutoConfig.for_model("mixtral", **small, **experts).save_pretrained(tmp_path / "moe")
    found, _ = model_sizes(config_of(tmp_path / "moe", student={"model": str(tmp_path / "moe")}))
    routed = 2 * 8 * 3 * 32 * 64  # layers, experts, matrices
    assert found.parameters - found.body == routed * 6 // 8 + 2 * 320 * 32


def test_size_of_kept_layers_is_smaller_by_the_others(teacher):
    whole, student = model_sizes(config_of(teacher))
    layer = 4 * 32 * 32 + 3 * 32 * 64 + 2 * 32
    assert whole.parameters - student.parameters == layer
    with pytest.raises(ModelError, match=r"layers=\[7\]"):
        model_sizes(config_of(teacher, student={"from_teacher": {"layers": [7]}}))


def test_size_of_a_shape_follows_the_teacher_and_of_the_demo_both(teacher):
    _, student = model_sizes(config_of(teacher, student={"shape": {"hidden_size": 16, "num_hidden_layers": 1}}))
    assert (student.hidden_size, student.vocab_size) == (16, tiny.VOCABULARY)
    demo = load(RunConfig, ROOT / "jobs" / "configs" / "demo.yaml")
    of_teacher, of_student = model_sizes(demo)
    assert (of_teacher.parameters, of_student.parameters) == (2_164_416, 418_272)  # the README's table


def test_size_of_a_model_without_config_is_an_error(tmp_path):
    (tmp_path / "empty").mkdir()
    with pytest.raises(ModelError, match="its config cannot be read"):
        model_sizes(config_of(tmp_path / "empty"))


def test_size_of_a_model_in_an_object_store_reads_its_config_alone(tmp_path, monkeypatch):
    asked = []

    class Bucket:
        def read(self, key):
            asked.append(key)
            return (tmp_path / "teacher" / key).read_bytes()

    tiny.save_model(tmp_path / "teacher")
    monkeypatch.setattr("jobs.planning.sizes.open_storage", lambda uri: asked.append(uri) or Bucket())
    found, _ = model_sizes(config_of("s3://bucket/teacher"))
    assert asked == ["s3://bucket/teacher", "config.json"]
    assert found.parameters == sum(item.numel() for item in tiny.model().parameters())


def test_plan_is_what_a_calculation_by_hand_gives(teacher):
    config = config_of(teacher, distill={"signal": "topk", "top_k": 16, "alpha": 0.5})
    found = plan(config, PlanOptions(student_utilisation=0.5, teacher_utilisation=0.25, students=8, tokens=1e12))
    head, layer, width, length = 320 * 32, 4 * 32 * 32 + 3 * 32 * 64 + 2 * 32, 32, 128
    of_student = 6 * (layer + width + head) + 3 * 2 * width * length
    of_teacher = 2 * (2 * layer + width + head) + 2 * 2 * width * length
    assert found["student"]["flops_per_token"] == of_student
    assert found["teacher"]["flops_per_token"] == of_teacher
    rate = 8 * 0.5 * 989e12 / of_student
    assert found["tokens_per_s"] == pytest.approx(rate)  # one node of eight: no network between nodes
    assert found["gradient_bytes"] == 0
    assert found["hours"] == pytest.approx(1e12 / rate / 3600)
    replicas = rate / (0.25 * 989e12 / of_teacher)
    assert found["teacher"]["cards"] == -int(-replicas // 1)
    assert found["teacher"]["busy"] == pytest.approx(replicas / found["teacher"]["cards"])
    assert found["usd"] == pytest.approx(4.916 * 8 * (1 + found["teacher"]["nodes"]) * found["hours"])
    size = found["signal"]["bytes_per_position"]
    assert found["signal"]["bytes_per_s"] == pytest.approx(rate * size)
    assert found["signal"]["label_bytes"] == pytest.approx(1e12 * size)


def test_plan_with_hidden_states_moves_the_head_to_the_student(teacher):
    topk = plan(config_of(teacher, distill={"signal": "topk"}), PlanOptions())
    hidden = plan(config_of(teacher, distill={"signal": "hidden"}), PlanOptions())
    head = 2 * 320 * 32
    assert topk["teacher"]["flops_per_token"] - hidden["teacher"]["flops_per_token"] == head
    assert hidden["student"]["flops_per_token"] - topk["student"]["flops_per_token"] == head


def test_plan_counts_the_gradients_between_nodes_and_the_pass_that_is_computed_again(teacher):
    alone = plan(config_of(teacher), PlanOptions(students=8))
    two = plan(config_of(teacher), PlanOptions(students=16, network_gbps=1))
    assert two["gradient_bytes"] == 4 * two["student"]["parameters"]  # 2 (n - 1) / n for two nodes
    step = two["gradient_bytes"] * 8e-9 + 64 * 128 / (16 * alone["student"]["card_tokens_per_s"])
    assert two["step_s"] == pytest.approx(step)
    assert two["student"]["busy"] == pytest.approx(1 - two["gradient_share"])
    again = {"steps": 100, "global_batch": 64, "micro_batch": 8, "gradient_checkpointing": True}
    checkpointing = plan(config_of(teacher, train=again), PlanOptions(students=8))
    assert checkpointing["student"]["flops_per_token"] > 1.15 * alone["student"]["flops_per_token"]


def test_plan_without_a_teacher_has_one_side(teacher):
    config = config_of(teacher, distill={"alpha": 1})
    found = plan(config, PlanOptions())
    assert found["teacher"] is None
    assert found["signal"] is None
    assert found["usd"] > 0
    assert any("tokens/s" in line for line in plan_lines(found))


def test_plan_defaults_come_from_the_config(teacher):
    found = plan(config_of(teacher), PlanOptions())
    assert found["tokens"] == 100 * 64 * 128
    assert found["student"]["cards"] == 2


def test_plan_says_what_will_not_go(teacher):
    found = plan(config_of(teacher), PlanOptions(students=80, network_gbps=0.1, student_card="l4", teacher_card="l4"))
    text = " ".join(found["warnings"])
    assert "80 student cards share train.global_batch=64" in text
    assert "gradients between nodes take" in text
    assert found["usd"] is None  # no price is at hand for it
    assert plan(config_of(teacher), PlanOptions(prices={"h100": 1.0}))["usd"] > 0
    slow = plan(config_of(teacher), PlanOptions(students=8, teacher_utilisation=0.05))
    assert slow["teacher"]["cards"] > 1
    assert f"set teacher.replicas={slow['teacher']['cards']}" in " ".join(slow["warnings"])
    heavy = config_of(teacher, distill={"signal": "dense"})
    assert "Gbit/s for a node, the network has 0.1" in " ".join(plan(heavy, PlanOptions(network_gbps=0.1))["warnings"])


def test_plan_of_a_model_that_is_too_large_says_so():
    config = load(RunConfig, ROOT / "infra" / "plans" / "70b_to_8b.yaml")
    config = config.replace(teacher={**config.teacher.model_dump(), "model": str(ROOT / "infra/plans/shapes/70b")})
    config = config.replace(student={"model": str(ROOT / "infra/plans/shapes/8b")})
    found = plan(config, PlanOptions())
    assert not found["teacher"]["fits"]
    assert "the teacher does not fit: 141 GB on a h100 of 80 GB" in " ".join(found["warnings"])
    assert plan(config, PlanOptions(teacher_card="b200"))["teacher"]["fits"]


def test_cards_and_prices_are_refused_by_name():
    assert len(CARDS) >= 6
    with pytest.raises(ConfigError, match="card tpu: not in the table; known: l4"):
        find_card("tpu")
    assert find_card("h100", {"h100": 2.5}).usd_per_hour == 2.5
    for text in ("h100", "h100=x", "h100=-1", "h100=inf", "tpu=1"):
        with pytest.raises(ConfigError):
            read_prices([text])
    assert read_prices(["h100=2", "l4=0.5"]) == {"h100": 2.0, "l4": 0.5}


def test_plan_on_the_command_line_prints_a_table_and_json(teacher, tmp_path, monkeypatch):
    from typer.testing import CliRunner

    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("COLUMNS", "160")
    Path("mine.yaml").write_text(config_of(teacher).model_dump_json(by_alias=True))
    arguments = ["plan", "mine.yaml", "--students", "4", "--price", "h100=2"]
    done = CliRunner().invoke(app, arguments)
    assert done.exit_code == 0, done.output
    assert "tokens/s of a card" in done.stdout
    assert "on ten times the cards" in done.stdout
    found = json.loads(CliRunner().invoke(app, [*arguments, "--json"]).stdout)
    assert found["student"]["cards"] == 4
    assert found["student"]["card"]["usd_per_hour"] == 2
    endless = CliRunner().invoke(app, [*arguments, "--tokens", "inf"])
    assert (endless.exit_code, endless.stderr.count("\n")) == (2, 1)
    assert "tokens: found inf" in endless.stderr
    wrong = CliRunner().invoke(app, [*arguments, "--student-card", "tpu"])
    assert wrong.exit_code == 2
    assert wrong.stderr.startswith("raystill: card tpu: not in the table")
    assert not Path("runs").exists()


@pytest.mark.parametrize("path", PLANS, ids=lambda path: path.stem)
def test_readme_of_infra_has_the_figures_of_the_shipped_plans(path, monkeypatch):
    """The rows of its table, as `plan` gives them."""
    monkeypatch.chdir(ROOT)
    page = (ROOT / "infra" / "README.md").read_text()
    commands = re.findall(rf"raystill plan {re.escape(str(path.relative_to(ROOT)))}( --[^\n`]*)?", page)
    assert commands
    for options in commands:
        given = dict(re.findall(r"--([a-z-]+) (\S+)", options))
        found = plan(
            load(RunConfig, path), PlanOptions(**{name.replace("-", "_"): value for name, value in given.items()})
        )
        row = (
            f"| {found['teacher']['cards']} {found['teacher']['card']['name']} "
            f"| {found['student']['cards']} {found['student']['card']['name']} "
            f"| {found['tokens_per_s']:,.0f} | {found['hours']:,.0f} |"
        )
        assert row in page, row
