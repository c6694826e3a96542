"""The exported graph is the model: with and without cache, padded or packed; tied weights are stored once."""

import numpy as np
import onnxruntime
import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM, BloomConfig

from cluster.errors import QuantizationFailed
from cluster.onnx_graph import CachedGraph
from jobs.quantization import onnx_decoder
from jobs.quantization.onnx_decoder import Reader, decoder_of, has_plain_cache
from jobs.quantization.onnx_export import export
from tests import tiny

GROUPED = {"num_attention_heads": 4, "num_key_value_heads": 2, "hidden_size": 64}
TOLERANCE = 1e-4
"""Of a logit, relative to the largest: float32 rounding through two layers."""


class Graph:
    """A float graph of a tiny model, and the model."""

    def __init__(self, directory, family, **changes):
        self.model = tiny.model(family, **changes)
        self.exact = tiny.model(family, **changes)
        export(decoder_of(self.model), 0, directory)
        self.size = (directory / "model.onnx").stat().st_size
        self.session = onnxruntime.InferenceSession(directory / "model.onnx", providers=["CPUExecutionProvider"])
        self.inputs = {item.name: item.shape for item in self.session.get_inputs()}
        self.outputs = [item.name for item in self.session.get_outputs()]

    def run(self, token_ids, mask, positions, past=None):
        rows = len(token_ids)
        empty = {
            name: np.zeros((rows, shape[1], 0, shape[3]), np.float32)
            for name, shape in self.inputs.items()
            if name.startswith("past")
        }
        feed = {"input_ids": token_ids, "attention_mask": mask, "position_ids": positions, **(past or empty)}
        logits, *present = self.session.run(self.outputs, {name: np.asarray(value) for name, value in feed.items()})
        return logits, dict(zip(empty, present, strict=True))

    def logits_of(self, token_ids):
        with torch.no_grad():
            return self.exact(torch.from_numpy(np.asarray(token_ids))).logits.numpy()


@pytest.fixture(scope="module", params=["llama_tied", "qwen", "gpt2"])
def graph(request, tmp_path_factory):
    changes = {} if request.param == "gpt2" else GROUPED
    return Graph(tmp_path_factory.mktemp("graph"), request.param, **changes)


def close(found, expected):
    assert found.shape == expected.shape
    assert np.abs(found - expected).max() <= TOLERANCE * np.abs(expected).max()


def test_names_are_those_of_optimum(graph):
    parts = [f"{layer}.{part}" for layer in range(2) for part in ("key", "value")]
    named = [f"past_key_values.{part}" for part in parts]
    assert list(graph.inputs) == ["input_ids", "attention_mask", "position_ids", *named]
    assert graph.outputs == ["logits", *(f"present.{part}" for part in parts)]
    for name in named:
        rows, heads, past, width = graph.inputs[name]
        assert (heads, width) == (2, 16)
        assert isinstance(rows, str)
        assert isinstance(past, str)


@pytest.mark.parametrize(
    ("rows", "cuts"), [(1, [9]), (1, [4, 9]), (1, [1, 2, 3, 9]), (3, [9]), (3, [7, 8, 9])], ids=str
)
def test_logits_are_those_of_the_model_however_the_text_is_cut(graph, rows, cuts):
    token_ids = np.random.default_rng(0).integers(1, tiny.VOCABULARY, (rows, 9))
    expected = graph.logits_of(token_ids)
    found, past, start = [], None, 0
    for end in cuts:
        positions = np.tile(np.arange(start, end), (rows, 1))
        logits, past = graph.run(token_ids[:, start:end], np.ones((rows, end), np.int64), positions, past)
        found.append(logits)
        start = end
    close(np.concatenate(found, 1), expected)
    assert all(value.shape == (rows, 2, 9, 16) for value in past.values())


@pytest.mark.parametrize("side", ["left", "right"])
def test_sequences_of_different_lengths_share_a_batch_with_a_padded_cache(graph, side):
    rng = np.random.default_rng(1)
    texts = [rng.integers(1, tiny.VOCABULARY, length) for length in (3, 7)]
    pasts = [
        graph.run(ids[None, :-1], np.ones((1, len(ids) - 1), np.int64), np.arange(len(ids) - 1)[None])[1]
        for ids in texts
    ]
    longest = 6
    together, mask = {}, np.ones((2, longest + 1), np.int64)
    for name in pasts[0]:
        together[name] = np.full((2, 2, longest, 16), 7.0, np.float32)  # what is there does not matter
        for row, past in enumerate(pasts):
            held = past[name].shape[2]
            place = slice(longest - held, None) if side == "left" else slice(0, held)
            together[name][row, :, place] = past[name][0]
            mask[row, :longest] = 0
            mask[row, :longest][place] = 1
    last = np.array([[ids[-1]] for ids in texts])
    positions = np.array([[len(ids) - 1] for ids in texts])
    found, _ = graph.run(last, mask, positions, together)
    for row, ids in enumerate(texts):
        close(found[row, -1], graph.logits_of(ids[None])[0, -1])


def test_numbered_sequences_in_a_row_do_not_see_each_other(graph):
    rng = np.random.default_rng(2)
    texts = [rng.integers(1, tiny.VOCABULARY, length) for length in (5, 4)]
    row = np.concatenate([texts[0], [0], texts[1]])[None]
    numbers = np.array([[1] * 5 + [0] + [2] * 4])
    positions = np.concatenate([np.arange(5), [0], np.arange(4)])[None]
    found, _ = graph.run(row, numbers, positions)
    close(found[0, :5], graph.logits_of(texts[0][None])[0])
    close(found[0, 6:], graph.logits_of(texts[1][None])[0])


def test_a_cache_stays_in_place_beside_rows_of_other_lengths(graph):
    rng = np.random.default_rng(3)
    texts = [rng.integers(1, tiny.VOCABULARY, length) for length in (3, 8, 1)]
    cached = CachedGraph(graph.session)
    caches = [np.full((3, cached.heads, 20, cached.width), np.nan, np.float32) for _ in range(cached.num_caches)]
    for row, ids in enumerate(texts[:2]):  # the third has read nothing yet
        rows = [cache[row : row + 1] for cache in caches]
        for start, end in ((0, 1), (1, len(ids) - 1)):
            mask, positions = np.ones((1, end), np.int64), np.arange(start, end)[None]
            found = cached.run(ids[None, start:end], positions, mask, rows, logits_from=end - start - 1)
            close(found[:, 0], graph.logits_of(ids[None, :end])[:, -1])
    lengths = np.array([len(ids) - 1 for ids in texts])
    for step in range(2):
        last = np.array([[ids[-1]] for ids in texts])
        mask = (np.arange(lengths.max() + 1) <= lengths[:, None]).astype(np.int64)
        found = cached.run(last, lengths[:, None], mask, caches)
        for row, ids in enumerate(texts):
            close(found[row, -1], graph.logits_of(ids[None])[0, -1])
        texts, lengths = [np.append(ids, step) for ids in texts], lengths + 1
    assert all(np.isnan(cache[row, :, lengths[row] :]).all() for cache in caches for row in range(3))


@pytest.mark.parametrize("first", [0, 2, 4])
def test_logits_of_the_last_tokens_alone(graph, first):
    token_ids = np.random.default_rng(4).integers(1, tiny.VOCABULARY, (2, 5))
    positions, mask = np.tile(np.arange(5), (2, 1)), np.ones((2, 5), np.int64)
    cached = CachedGraph(graph.session)
    caches = [np.zeros((2, cached.heads, 5, cached.width), np.float32) for _ in range(cached.num_caches)]
    found = cached.run(token_ids, positions, mask, caches, logits_from=first)
    close(found, graph.logits_of(token_ids)[:, first:])


def test_tied_weights_are_stored_once(graph):
    weights = 4 * graph.exact.num_parameters()  # which counts a tied embedding once
    assert weights <= graph.size < weights + 200_000


WINDOWS = {
    "gemma2_soft_cap": {"sliding_window": 8, "num_hidden_layers": 2, "attn_logit_softcapping": 3.0},
    "qwen": {"use_sliding_window": True, "sliding_window": 8, "max_window_layers": 0},
    "gemma3": {"sliding_window": 8, "layer_types": ["sliding_attention", "full_attention"], "head_dim": 16},
}


@pytest.mark.parametrize("family", WINDOWS)
def test_layers_with_windows_keep_a_cache_and_see_no_further(family, tmp_path):
    graph = Graph(tmp_path, family, **WINDOWS[family])
    token_ids = np.random.default_rng(5).integers(1, tiny.VOCABULARY, 23)
    cached = CachedGraph(graph.session)
    caches = [np.full((1, cached.heads, 30, cached.width), np.nan, np.float32) for _ in range(cached.num_caches)]
    found, start = [], 0
    for end in (5, 7, 8, 9, 18, 20, *range(21, 24)):
        mask, positions = np.ones((1, end), np.int64), np.arange(start, end)[None]
        found.append(cached.run(token_ids[None, start:end], positions, mask, caches))
        start = end
    close(np.concatenate(found, 1), graph.logits_of(token_ids[None]))
    # Together with a text of its own in one row, as texts are scored.
    numbers = np.array([[1] * 23 + [2] * 12])
    both = np.concatenate([token_ids, token_ids[:12]])[None]
    packed, _ = graph.run(both, numbers, np.concatenate([np.arange(23), np.arange(12)])[None])
    close(packed[0, 23:], graph.logits_of(token_ids[None, :12])[0])


@pytest.mark.parametrize(("family", "plain"), [("llama", True), ("gemma3_text", True), ("mamba", False)])
def test_recurrent_states_are_no_cache_of_keys_and_values(family, plain):
    assert has_plain_cache(AutoConfig.for_model(family)) == plain


def test_windows_that_the_config_does_not_tell_of_leave_the_cache_out(monkeypatch):
    def blind(*arguments, sliding_window=None, **keywords):
        return exact(*arguments, **keywords)

    exact = onnx_decoder.cached_attention
    monkeypatch.setattr(onnx_decoder, "cached_attention", blind)
    model = tiny.model("qwen", **WINDOWS["qwen"])
    assert isinstance(decoder_of(model), Reader)
    assert model.config._attn_implementation != onnx_decoder._CACHED


def test_heads_that_the_operator_does_not_take_are_exported_without_a_cache(tmp_path):
    narrow = {"hidden_size": 24, "num_attention_heads": 2, "num_key_value_heads": 2, "head_dim": 12}
    model, exact = tiny.model("llama", **narrow), tiny.model("llama", **narrow)
    decoder = decoder_of(model)
    assert isinstance(decoder, Reader)
    export(decoder, 0, tmp_path)
    session = onnxruntime.InferenceSession(tmp_path / "model.onnx", providers=["CPUExecutionProvider"])
    token_ids, positions = np.arange(3, 9)[None], np.arange(6)[None]
    with torch.no_grad():
        expected = exact(torch.from_numpy(token_ids)).logits.numpy()
    close(session.run(["logits"], {"input_ids": token_ids, "position_ids": positions})[0], expected)


def test_an_attention_that_cannot_be_replaced_is_refused():
    model = AutoModelForCausalLM.from_config(BloomConfig(vocab_size=40, hidden_size=32, n_layer=1, n_head=2))
    with pytest.raises(QuantizationFailed, match="BloomForCausalLM has an attention of its own"):
        decoder_of(model)


def test_a_family_that_computes_something_else_with_a_cache_is_refused(monkeypatch):
    def shifted(*arguments, **keywords):
        found, nothing = exact(*arguments, **keywords)
        return 1.01 * found, nothing

    exact = onnx_decoder.cached_attention
    monkeypatch.setattr(onnx_decoder, "cached_attention", shifted)
    with pytest.raises(QuantizationFailed, match=r"LlamaForCausalLM with a cache computes other logits"):
        decoder_of(tiny.model("llama"))
