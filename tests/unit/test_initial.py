"""The student before its first step: kept layers are the teacher's, shapes are as asked, mistakes are named."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from cluster.errors import ConfigError, ModelError
from cluster.pretrained import load_tokenizer
from jobs.config import KeptLayers, StudentConfig
from jobs.shape import shape_config
from jobs.training.initial import build_student, keep_layers
from tests import tiny

IDS = torch.randint(0, tiny.VOCABULARY, (2, 40), generator=torch.Generator().manual_seed(3))
FAMILIES = ["llama", "llama_tied", "qwen", "qwen3_tied", "gpt2", "glm", "gemma2_soft_cap", "cohere_logit_scale"]


def deep(family: str, layers: int = 4) -> Any:
    key = "n_layer" if family == "gpt2" else "num_hidden_layers"
    return tiny.model(family, **{key: layers})


def layer_list(model: Any) -> Any:
    return model.transformer.h if hasattr(model, "transformer") else model.model.layers


def logits(model: Any) -> torch.Tensor:
    with torch.no_grad():
        return model(input_ids=IDS, use_cache=False).logits


def is_tied(model: Any) -> bool:
    return model.get_output_embeddings().weight is model.get_input_embeddings().weight


@pytest.mark.parametrize("family", FAMILIES)
def test_keep_layers_all_of_them_gives_identical_logits(family):
    teacher = deep(family)
    student = keep_layers(teacher, [0, 1, 2, 3])
    assert torch.equal(logits(student), logits(teacher))
    assert (
        is_tied(student)
        == is_tied(teacher)
        == ("tied" in family or family in ("gpt2", "gemma2_soft_cap", "cohere_logit_scale"))
    )


@pytest.mark.parametrize("layers", [[0, 2], [3, 1, 0], [1]])
@pytest.mark.parametrize("family", FAMILIES)
def test_keep_layers_some_of_them_keeps_their_weights_and_all_else(family, layers):
    teacher = deep(family)
    student = keep_layers(teacher, layers)
    assert student.config.num_hidden_layers == len(layer_list(student)) == len(layers)
    for mine, index in zip(layer_list(student), layers, strict=True):
        theirs = layer_list(teacher)[index]
        for (name, value), (other, expected) in zip(
            mine.state_dict().items(), theirs.state_dict().items(), strict=True
        ):
            assert name == other
            assert torch.equal(value, expected)
            assert value.data_ptr() != expected.data_ptr(), "the student must not share memory with the teacher"
    outside = {
        name: value for name, value in teacher.state_dict().items() if ".layers." not in name and ".h." not in name
    }
    found = student.state_dict()
    assert outside
    assert all(torch.equal(found[name], value) for name, value in outside.items())
    assert logits(student).isfinite().all()
    assert not torch.equal(logits(student), logits(teacher))


def test_keep_layers_keeps_the_type_of_each_layer():
    teacher = deep("gemma2_soft_cap")
    assert teacher.config.layer_types == ["sliding_attention", "full_attention"] * 2
    student = keep_layers(teacher, [1, 2, 3])
    assert student.config.layer_types == ["full_attention", "sliding_attention", "full_attention"]


def test_keep_layers_leaves_lists_that_are_only_as_long_as_the_layers():
    teacher = deep("llama", layers=2)
    teacher.config.eos_token_id = [5, 7]
    assert keep_layers(teacher, [1]).config.eos_token_id == [5, 7]


def test_keep_layers_can_be_saved_and_loaded(tmp_path):
    from transformers import AutoModelForCausalLM

    for family in ("llama_tied", "gemma2_soft_cap"):
        student = keep_layers(deep(family), [0, 3])
        student.save_pretrained(tmp_path / family)
        again = AutoModelForCausalLM.from_pretrained(tmp_path / family)
        assert torch.equal(logits(again), logits(student))


@pytest.mark.parametrize("layers", [[4], [-1], [0, 0], [], [0, 99]])
def test_keep_layers_bad_indices_are_refused(layers):
    with pytest.raises(ModelError, match=r"teacher's layers 0\.\.3"):
        keep_layers(deep("llama"), layers)


def test_keep_layers_that_are_scaled_by_their_place_is_refused():
    with pytest.raises(ModelError, match="scaled by a layer's place"):
        keep_layers(tiny.model("gpt2", scale_attn_by_inverse_layer_idx=True), [1])


def test_keep_layers_of_a_family_without_one_list_is_refused():
    teacher = deep("llama")
    teacher.config.num_hidden_layers = 7
    with pytest.raises(ModelError, match="LlamaForCausalLM has no single list of layers"):
        keep_layers(teacher, [0])


@pytest.fixture
def teacher_directory(tmp_path):
    return str(tiny.save_model(tmp_path / "teacher", num_attention_heads=4, num_key_value_heads=2))


def build(teacher: str | None, tokenizer_at: str, seed: int = 0, **origin: Any) -> Any:
    return build_student(StudentConfig(**origin), teacher, load_tokenizer(tokenizer_at), seed)


def test_student_of_a_shape_has_the_teachers_family_with_the_changed_keys(teacher_directory):
    student = build(teacher_directory, teacher_directory, shape={"num_hidden_layers": 1, "hidden_size": 16})
    teacher_config = json.loads(Path(teacher_directory, "config.json").read_text())
    assert type(student).__name__ == "LlamaForCausalLM"
    assert (student.config.num_hidden_layers, student.config.hidden_size) == (1, 16)
    assert student.config.head_dim == 4
    for key in ("vocab_size", "intermediate_size", "num_attention_heads", "num_key_value_heads", "bos_token_id"):
        assert getattr(student.config, key) == teacher_config[key]
    assert {item.dtype for item in student.parameters()} == {torch.float32}


def test_student_of_a_named_family_has_the_tokenizers_vocabulary(teacher_directory):
    tokenizer = load_tokenizer(teacher_directory)
    shape = {"model_type": "gpt2", "hidden_size": 24, "n_layer": 2, "num_attention_heads": 2}
    student = build(None, teacher_directory, shape=shape)
    assert (student.config.n_embd, student.config.n_layer, student.config.n_head) == (24, 2, 2)
    assert student.config.vocab_size == len(tokenizer)
    assert student.config.eos_token_id == tokenizer.eos_token_id
    assert build(teacher_directory, teacher_directory, shape=shape).config.model_type == "gpt2"


def test_student_of_the_same_seed_has_the_same_weights_and_leaves_the_generator(teacher_directory):
    shape = {"num_hidden_layers": 1}
    torch.manual_seed(99)
    expected = torch.rand(3)
    torch.manual_seed(99)
    one = build(teacher_directory, teacher_directory, 5, shape=shape).state_dict()
    assert torch.equal(torch.rand(3), expected)
    same = build(teacher_directory, teacher_directory, 5, shape=shape).state_dict()
    other = build(teacher_directory, teacher_directory, 6, shape=shape).state_dict()
    assert all(torch.equal(value, same[name]) for name, value in one.items())
    assert not torch.equal(one["lm_head.weight"], other["lm_head.weight"])


def test_student_from_teacher_and_from_a_model_have_their_weights(teacher_directory):
    kept = build(teacher_directory, teacher_directory, from_teacher=KeptLayers(layers=[1]))
    same = build(None, teacher_directory, model=teacher_directory)
    expected = tiny.model(num_attention_heads=4, num_key_value_heads=2)
    assert torch.equal(logits(same), logits(expected))
    assert torch.equal(layer_list(kept)[0].mlp.up_proj.weight, layer_list(expected)[1].mlp.up_proj.weight)
    with pytest.raises(ConfigError, match="needs a teacher"):
        build(None, teacher_directory, from_teacher=KeptLayers(layers=[0]))


@pytest.mark.parametrize(
    ("shape", "message"),
    [
        ({"hiden_size": 16}, "llama has no key hiden_size: did you mean hidden_size"),
        ({"zzz": 16}, "llama has no key zzz: known: .*num_hidden_layers"),
        ({"hidden_size": 30}, "refused by transformers .*30.* multiple of the number of attention heads"),
        ({"num_attention_heads": "two"}, "refused by transformers .*num_attention_heads.*two"),
        ({"num_attention_heads": 1}, "num_attention_heads=1 is not a multiple of num_key_value_heads=2"),
        ({"model_type": "lama"}, "refused by transformers .*lama"),
        ({"model_type": "gpt2", "n_embed": 3}, "gpt2 has no key n_embed: did you mean n_embd"),
    ],
)
def test_shape_that_cannot_be_is_refused(teacher_directory, shape, message):
    with pytest.raises(ConfigError, match=message):
        shape_config(shape, teacher_directory, 320)


def test_shape_without_a_family_or_with_values_found_out_late_is_refused(teacher_directory):
    with pytest.raises(ConfigError, match="without a teacher set model_type"):
        shape_config({"hidden_size": 8}, None, 320)
    with pytest.raises(ConfigError, match=r"student\.shape: LlamaConfig cannot be built: KeyError: 'nope'"):
        build(teacher_directory, teacher_directory, shape={"hidden_act": "nope"})


def test_shape_of_gemma2_has_as_many_layer_types_as_layers(tmp_path):
    teacher = str(tiny.save_model(tmp_path, "gemma2_soft_cap", num_hidden_layers=4))
    assert len(shape_config({"num_hidden_layers": 3}, teacher, 320).layer_types) == 3
    same = shape_config({"intermediate_size": 16}, teacher, 320)
    assert (len(same.layer_types), same.head_dim, same.final_logit_softcapping) == (4, 16, 2.0)


def test_shape_by_general_names_changes_the_familys_own(tmp_path):
    teacher = str(tiny.save_model(tmp_path, "gpt2"))
    config = shape_config({"hidden_size": 64, "num_hidden_layers": 1}, teacher, 320)
    assert (config.n_embd, config.n_layer, config.n_head, config.vocab_size) == (64, 1, 2, 320)
