"""Splitting, packing and loading of language models: right for the families we know, refused for the others."""

import json
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

from cluster.errors import ModelError
from cluster.grid import pack
from cluster.language_model import OutputHead, choose_dtype, hidden_states, load_causal_lm, split
from tests import tiny


@pytest.mark.parametrize("family", tiny.FAMILIES)
def test_split_of_every_family_gives_the_models_own_logits(family):
    model = tiny.model(family)
    body, head = split(model)
    ids = torch.randint(0, tiny.VOCABULARY, (2, 50), generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        expected = model(input_ids=ids, use_cache=False).logits
        found = head.logits(hidden_states(body, ids, torch.arange(50).expand(2, 50)))
    assert expected.std() > 0.01
    torch.testing.assert_close(found, expected.float(), atol=1e-5, rtol=1e-5)


def test_split_heads_of_the_families_use_every_part_of_the_formula():
    heads = {family: split(tiny.model(family))[1] for family in tiny.FAMILIES}
    assert heads["gemma2_soft_cap"].soft_cap == 2.0
    assert heads["cohere_logit_scale"].scale == 0.25
    assert heads["granite_logit_scale"].scale == pytest.approx(1 / 3)
    assert heads["phi_head_bias"].bias_V is not None
    assert heads["llama"].bias_V is heads["llama"].soft_cap is None


@pytest.mark.parametrize("training", [True, False])
def test_split_leaves_the_mode_of_the_model(training):
    model = tiny.model().train(training)
    split(model)
    assert model.training is training


def changed_logits(model: Any, change: Any) -> Any:
    forward = model.forward

    def other(*args: Any, **kwargs: Any) -> Any:
        out = forward(*args, **kwargs)
        out.logits = change(out.logits)
        return out

    model.forward = other
    return model


@pytest.mark.parametrize(
    "change",
    [
        lambda logits: logits * 1.01,
        lambda logits: torch.tanh(logits),
        lambda logits: logits + torch.arange(logits.shape[-1]) * 1e-3,
        lambda logits: logits[..., :-1],
        lambda logits: logits.roll(1, 1),
    ],
    ids=["scaled", "capped", "biased", "cut", "shifted"],
)
def test_split_of_a_model_that_changes_its_logits_is_refused(change):
    with pytest.raises(ModelError, match="LlamaForCausalLM computes its logits in a way"):
        split(changed_logits(tiny.model(), change))


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_split_of_a_model_whose_logits_are_not_finite_is_refused(value):
    with pytest.raises(ModelError, match="logits that are not finite"):
        split(changed_logits(tiny.model(), lambda logits: logits + value))


def test_split_of_a_model_whose_config_names_another_scale_is_refused():
    model = tiny.model()
    model.config.logit_scale = 0.5  # Llama does not use it
    with pytest.raises(ModelError, match="computes its logits"):
        split(model)


@pytest.mark.parametrize("kind", ["bidirectional", "without_borders"])
def test_split_of_a_body_that_sees_what_it_must_not_is_refused(kind):
    model = tiny.model()
    inner = model.model.forward

    def forward(input_ids: torch.Tensor, position_ids: torch.Tensor | None = None, **kwargs: Any) -> Any:
        if kind == "bidirectional":
            length = input_ids.shape[1]
            kwargs["attention_mask"] = torch.zeros(len(input_ids), 1, length, length)
            return inner(input_ids, position_ids=position_ids, **kwargs)
        return inner(input_ids, **kwargs)  # as a recurrent body does

    model.model.forward = forward
    with pytest.raises(ModelError, match="lets a token see later ones, or other sequences"):
        split(model)


def test_split_of_a_body_without_positions_is_refused():
    model = tiny.model()
    inner = model.model.forward

    def without(input_ids: torch.Tensor, use_cache: bool) -> Any:
        return inner(input_ids, use_cache=use_cache)

    model = changed_logits(model, lambda logits: logits)
    model.model.forward = without
    with pytest.raises(ModelError, match="cannot be run on packed sequences"):
        split(model)


def test_split_of_a_model_that_rotates_by_the_longest_of_a_batch_is_refused():
    rope = {"rope_type": "longrope", "rope_theta": 10_000.0, "short_factor": [1.0] * 8, "long_factor": [4.0] * 8}
    rope |= {"original_max_position_embeddings": 32, "partial_rotary_factor": 1.0, "factor": 4.0}
    tiny.FAMILIES["phi3"] = {"model_type": "phi3", "pad_token_id": 0}
    try:
        split(tiny.model("phi3"))
        with pytest.raises(ModelError, match=r"longrope.*depend on others"):
            split(tiny.model("phi3", rope_parameters=rope))
    finally:
        del tiny.FAMILIES["phi3"]


def test_split_of_a_model_whose_body_is_none_is_refused():
    model = tiny.model()
    model.base_model_prefix = ""  # then the body is the whole, and gives no hidden states
    with pytest.raises(ModelError, match="packed sequences"):
        split(model)


def test_split_of_a_model_without_a_linear_head_is_refused():
    model = tiny.model()
    model.set_output_embeddings(nn.Identity())
    with pytest.raises(ModelError, match="no linear output head"):
        split(model)


def test_output_head_is_the_documented_formula_in_float64():
    torch.manual_seed(0)
    hidden, weight, bias = (torch.randn(*shape) for shape in ((5, 8), (11, 8), (11,)))
    found = OutputHead(weight, bias, 0.7, 3.0).logits(hidden).double()
    expected = 3.0 * torch.tanh(0.7 * (hidden.double() @ weight.double().T + bias.double()) / 3.0)
    torch.testing.assert_close(found, expected, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("family", tiny.FAMILIES)
def test_packed_sequences_equal_each_one_alone(family):
    model = tiny.model(family)
    lengths = np.array([30, 1, 64, 20, 15, 3])
    tokens = np.random.default_rng(0).integers(0, tiny.VOCABULARY, lengths.sum())
    grid = pack(tokens, lengths)
    assert grid.token_ids_BT.shape == (3, 64)
    with torch.no_grad():
        packed = hidden_states(
            model.base_model, torch.from_numpy(grid.token_ids_BT), torch.from_numpy(grid.position_ids_BT)
        ).flatten(0, 1)[torch.from_numpy(grid.index_S)]
        for start, length in zip(np.cumsum(lengths) - lengths, lengths, strict=True):
            ids = torch.from_numpy(tokens[start : start + length])[None]
            alone = model.base_model(input_ids=ids, use_cache=False).last_hidden_state[0]
            torch.testing.assert_close(packed[start : start + length], alone, atol=2e-5, rtol=1e-4)


def test_load_gives_the_saved_weights_in_the_asked_dtype(tmp_path):
    tiny.save_model(tmp_path)
    expected = tiny.model().state_dict()
    for dtype in (torch.float32, torch.bfloat16):
        loaded = load_causal_lm(str(tmp_path), dtype)
        assert not loaded.training
        assert {item.dtype for item in loaded.parameters()} == {dtype}
        for name, value in loaded.state_dict().items():
            assert torch.equal(value, expected[name].to(dtype)), name


def save_gguf(model: Any, path: Any) -> None:
    """A Llama as other programs write it: names of its own, rows of q and k interleaved, 8-bit matrices."""
    import gguf

    config = model.config
    writer = gguf.GGUFWriter(path, "llama")
    writer.add_block_count(config.num_hidden_layers)
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(config.num_key_value_heads)
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_rope_freq_base(config.rope_parameters["rope_theta"])
    writer.add_vocab_size(config.vocab_size)
    names = gguf.get_tensor_name_map(gguf.MODEL_ARCH.LLAMA, config.num_hidden_layers)
    for name, value in model.state_dict().items():
        array = value.numpy()
        if "q_proj" in name or "k_proj" in name:
            heads = config.num_attention_heads
            array = array.reshape(heads, 2, -1, array.shape[1]).swapaxes(1, 2).reshape(array.shape)
        kind = gguf.GGMLQuantizationType.Q8_0 if array.ndim == 2 else gguf.GGMLQuantizationType.F32
        writer.add_tensor(
            names.get_name(name, (".weight",)), gguf.quants.quantize(np.ascontiguousarray(array), kind), raw_dtype=kind
        )
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def test_load_of_a_gguf_file_gives_plain_weights_that_can_be_saved(tmp_path):
    original = tiny.model()
    save_gguf(original, tmp_path / "tiny.gguf")
    loaded = load_causal_lm(str(tmp_path), torch.float32, "tiny.gguf")
    loaded.save_pretrained(tmp_path / "plain")
    again = load_causal_lm(str(tmp_path / "plain"))
    token_ids = torch.arange(1, 40)[None]
    with torch.no_grad():
        of_original, of_loaded, of_again = (item(token_ids).logits for item in (original, loaded, again))
    assert torch.equal(of_loaded, of_again)
    assert torch.nn.functional.cosine_similarity(of_original, of_loaded, dim=-1).min() > 0.999


def edit_weights(directory: Any, change: Any) -> None:
    from safetensors.torch import load_file, save_file

    path = directory / "model.safetensors"
    save_file(change(load_file(path)), path, {"format": "pt"})


def test_load_with_missing_weights_is_refused_not_filled_at_random(tmp_path):
    tiny.save_model(tmp_path)
    edit_weights(tmp_path, lambda weights: {key: value for key, value in weights.items() if key != "lm_head.weight"})
    with pytest.raises(ModelError, match=r"LlamaForCausalLM needs weights that are not there: lm_head\.weight"):
        load_causal_lm(str(tmp_path))


def test_load_of_a_tied_model_needs_no_head(tmp_path):
    tiny.save_model(tmp_path, "llama_tied")
    edit_weights(tmp_path, lambda weights: {key: value for key, value in weights.items() if key != "lm_head.weight"})
    assert torch.equal(load_causal_lm(str(tmp_path)).lm_head.weight, tiny.model("llama_tied").lm_head.weight)


def test_load_of_weights_of_another_shape_is_refused(tmp_path):
    tiny.save_model(tmp_path)
    edit_weights(tmp_path, lambda weights: {key: value[:-1].contiguous() for key, value in weights.items()})
    with pytest.raises(ModelError, match=str(tmp_path)):
        load_causal_lm(str(tmp_path))


def test_load_of_a_cut_file_is_refused(tmp_path):
    tiny.save_model(tmp_path)
    path = tmp_path / "model.safetensors"
    path.write_bytes(path.read_bytes()[:1000])
    with pytest.raises(ModelError, match="cannot be loaded"):
        load_causal_lm(str(tmp_path))


def test_load_of_a_directory_without_weights_or_of_another_kind_is_refused(tmp_path):
    tiny.save_model(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps({**config, "model_type": "no_such_family"}))
    with pytest.raises(ModelError, match="no_such_family"):
        load_causal_lm(str(tmp_path))
    (tmp_path / "model.safetensors").unlink()
    with pytest.raises(ModelError, match=r"no \*\.safetensors weights"):
        load_causal_lm(str(tmp_path))


def test_choose_dtype_takes_the_name_or_what_the_processor_multiplies(monkeypatch):
    device = torch.device("cpu")
    assert choose_dtype("float32", device) == torch.float32
    assert choose_dtype("bfloat16", device) == torch.bfloat16
    for has, expected in ((True, torch.bfloat16), (False, torch.float32)):
        monkeypatch.setattr("cluster.language_model.cpu_has_bfloat16", lambda has=has: has)
        assert choose_dtype("auto", device) == expected
