"""Speed, memory, arithmetic and energy: what is counted is right, and what cannot be read is said to be absent."""

import contextlib
import subprocess
import sys
import time
from types import SimpleNamespace

import numpy as np
import psutil
import pytest
import torch

from cluster.errors import EvaluationFailed
from cluster.language_model import load_causal_lm
from jobs.config import EvaluateConfig
from jobs.evaluating import efficiency
from jobs.evaluating.efficiency import count_flops, measure_efficiency
from jobs.evaluating.energy import EnergyMeter, find_zones
from jobs.evaluating.intervals import median_with_interval
from jobs.quantization.torch_scorer import TorchScorer
from jobs.training.data import Row, RowId
from tests import tiny


def row(length):
    tokens = np.random.default_rng(0).integers(0, tiny.VOCABULARY, length).astype(np.int32)
    return Row(RowId(0, 0), tokens, np.array([length], np.int32), np.ones(length, bool), length)


def test_efficiency_of_a_model_is_measured_in_a_process_of_its_own(tmp_path):
    changes = {"hidden_size": 256, "vocab_size": 40_000}
    model = tiny.model("llama", **changes)
    model.save_pretrained(tmp_path / "m")
    held = np.ones(1 << 26)  # half a gigabyte of this process, which is none of the model's
    config = EvaluateConfig(speed_batches=[2, 1], prompt_tokens=12, new_tokens=3, repeats=6)
    found = measure_efficiency(str(tmp_path / "m"), "float", [row(24), row(30)], config, 1)
    assert held.all()
    figures = found.figures
    assert figures["parameters"] == model.num_parameters()
    weights = 4 * model.num_parameters()
    assert weights > 80e6
    assert figures["peak_memory_bytes"] - figures["base_memory_bytes"] > weights
    assert figures["peak_memory_bytes"] < 10 * weights + figures["base_memory_bytes"]
    assert figures["base_memory_bytes"] < held.nbytes
    assert figures["tokens_per_s"] == figures["tokens_per_s_batch_2"] > 0
    assert figures["tokens_per_s_batch_1"] > 0
    assert figures["prompt_tokens"] == 12
    assert figures["timings"] == 6
    for name in ("first_token_s", "token_s", "tokens_per_s_batch_1", "tokens_per_s_batch_2"):
        assert figures[f"{name}_low"] <= figures[name] <= figures[f"{name}_high"]
        assert figures[f"{name}_low"] < figures[f"{name}_high"]
    assert 0 < figures["token_s"] < 10
    assert 0 < figures["first_token_s"] < 10
    assert "flops_per_token" in figures
    assert ("joules_per_token" in figures) != bool(found.absent.get("joules_per_token"))
    assert found.machine["torch"] == torch.__version__


def test_interval_of_a_median_holds_it_nineteen_times_of_twenty():
    draw = np.random.default_rng(0)
    for count in (6, 30):
        held = 0
        for _ in range(200):
            found = median_with_interval("x_s", draw.lognormal(0.0, 1.0, count))  # whose median is 1
            held += found["x_s_low"] <= 1.0 <= found["x_s_high"]
        assert held / 200 > 0.93, count
        assert found["x_s_low"] <= found["x_s"] <= found["x_s_high"]
    assert median_with_interval("x_s", [3.0, 1.0, 2.0, 9.0, 1.0]) == {
        "x_s": 2.0
    }  # the extremes of five hold it 15 in 16
    assert median_with_interval("x_s", [6.0, 1, 2, 3, 4, 5]) == {"x_s": 3.5, "x_s_low": 1.0, "x_s_high": 6.0}


def test_process_that_ends_without_figures_is_named(tmp_path):
    with pytest.raises(EvaluationFailed, match=r"the process that measures its speed.*code 1 \(.*ModelError: model"):
        measure_efficiency(str(tmp_path), "float", [row(8)], EvaluateConfig(), 1)


def test_process_ends_with_the_one_that_started_it():
    """Also when that one is gone before the new process has begun to look."""
    inner = (
        "import sys, time; from jobs.evaluating.efficiency import end_with; end_with(int(sys.argv[1])); time.sleep(99)"
    )
    outer = (
        "import os, subprocess, sys\n"
        f"child = subprocess.Popen([sys.executable, '-c', {inner!r}, str(os.getpid())], stdout=subprocess.DEVNULL)\n"
        "print(child.pid)\n"
    )
    done = subprocess.run([sys.executable, "-c", outer], capture_output=True, text=True, timeout=60)
    child = psutil.Process(int(done.stdout))
    try:
        end = time.monotonic() + 60
        while child.is_running() and child.status() != psutil.STATUS_ZOMBIE:
            assert time.monotonic() < end, "it outlived the process that started it"
            time.sleep(0.1)
    finally:
        with contextlib.suppress(psutil.NoSuchProcess):
            child.kill()


@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_flops_are_those_of_the_products(tmp_path, family):
    """Two for each weight of a linear layer, and of attention two products of T x T x width for each layer."""
    model = tiny.model(family)
    model.save_pretrained(tmp_path / "m")
    length, width, layers = 48, 32, 2
    found = count_flops(TorchScorer(str(tmp_path / "m"), 1), row(length))
    embeddings = {"llama": ["embed_tokens"], "gpt2": ["wpe"]}[family]  # GPT-2's token embedding is its head
    weights = sum(
        weight.numel()
        for name, weight in load_causal_lm(str(tmp_path / "m")).named_parameters()
        if weight.dim() == 2 and not any(part in name for part in embeddings)
    )
    expected = 2 * weights * length + layers * 2 * 2 * length * length * width
    assert found * length == pytest.approx(expected, rel=1e-3)


def test_greedy_continuation_with_a_cache_is_the_one_without(tmp_path):
    scorer = TorchScorer(str(tiny.save_model(tmp_path / "m")), 1)
    token_ids = prompt = row(10).token_ids.tolist()
    for token in scorer.greedy(prompt, 5):
        with torch.no_grad():
            assert token == int(scorer.model(input_ids=torch.tensor([token_ids])).logits[0, -1].argmax())
        token_ids = [*token_ids, token]
    assert len(token_ids) == 15


# --- energy -----------------------------------------------------------------------------------------------------------


def powercap(root, zones):
    for name, (label, energy, most) in zones.items():
        (root / name).mkdir(parents=True)
        for file, value in (("name", label), ("energy_uj", energy), ("max_energy_range_uj", most)):
            (root / name / file).write_text(f"{value}\n")
    return root


def test_energy_of_the_packages_is_added_up_and_counters_may_turn(tmp_path):
    root = powercap(
        tmp_path,
        {
            "intel-rapl:0": ("package-0", 1_000_000, 10_000_000),
            "intel-rapl:0:0": ("core", 5, 10),
            "intel-rapl:1": ("package-1", 9_000_000, 10_000_000),
            "intel-rapl:2": ("psys", 77, 100),
        },
    )
    assert [zone.path.name for zone in find_zones(root)[0]] == ["intel-rapl:0", "intel-rapl:1"]
    meter = EnergyMeter(False, root)
    assert (meter.absent, meter.source) == ("", "RAPL")
    before = meter.read_j()
    (root / "intel-rapl:0/energy_uj").write_text("3500000")
    (root / "intel-rapl:1/energy_uj").write_text("500000")
    assert meter.used_j(before, meter.read_j()) == pytest.approx(2.5 + 1.5)


def test_energy_that_cannot_be_read_is_absent_with_the_reason(tmp_path):
    assert "no processor counters" in EnergyMeter(False, tmp_path / "none").absent
    root = powercap(tmp_path / "zones", {"intel-rapl:0": ("package-0", "x", 10)})
    assert "invalid literal" in EnergyMeter(False, root).absent
    assert EnergyMeter(False, root).read_j() == []
    assert EnergyMeter(False, root).used_j([], []) == 0


def test_energy_counter_that_needs_another_user_is_absent(tmp_path, monkeypatch):
    root = powercap(tmp_path, {"intel-rapl:0": ("package-0", 5, 10)})
    read = efficiency.Path.read_text

    def guarded(path, *arguments, **named):
        if path.name == "energy_uj":
            raise PermissionError(13, "Permission denied")
        return read(path, *arguments, **named)

    monkeypatch.setattr(efficiency.Path, "read_text", guarded)
    assert "energy_uj is not readable for this user" in EnergyMeter(False, root).absent


def test_energy_of_a_gpu_is_nvml_s_millijoules(monkeypatch):
    counter = iter([4_000, 5_000, 9_500])
    nvml = SimpleNamespace(
        nvmlInit=lambda: None,
        nvmlDeviceGetHandleByUUID=lambda uuid: uuid,
        nvmlDeviceGetTotalEnergyConsumption=lambda handle: next(counter),
    )
    monkeypatch.setitem(sys.modules, "pynvml", nvml)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda number: SimpleNamespace(uuid="abc"))
    meter = EnergyMeter(True)
    assert (meter.absent, meter.source) == ("", "NVML")
    before = meter.read_j()
    assert meter.used_j(before, meter.read_j()) == pytest.approx(4.5)


def test_energy_of_a_gpu_without_a_driver_is_absent(monkeypatch):
    monkeypatch.setitem(sys.modules, "pynvml", None)
    assert EnergyMeter(True).absent == "the package nvidia-ml-py is not installed"
