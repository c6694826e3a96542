"""Schemes beside models and machines: what does not go together is refused with a way out, before any work."""

import sys

import pytest
from transformers import AutoConfig

from cluster.errors import ConfigError
from jobs.quantization.config import QuantizationScheme, QuantizeConfig
from jobs.quantization.pairings import PAIRINGS, check_pairings, model_kind

LLAMA = AutoConfig.for_model("llama", architectures=["LlamaForCausalLM"])
GPT2 = AutoConfig.for_model("gpt2", architectures=["GPT2LMHeadModel"])
BERT = AutoConfig.for_model("bert", architectures=["BertForSequenceClassification"])
T5 = AutoConfig.for_model("t5", architectures=["T5ForConditionalGeneration"])


def config(*schemes, **changes):
    return QuantizeConfig(schemes=list(schemes), **changes)


@pytest.mark.parametrize(
    ("model", "kind"),
    [
        (LLAMA, "decoder"),
        (GPT2, "conv1d_decoder"),
        (BERT, "encoder"),
        (AutoConfig.for_model("roberta", architectures=["RobertaForMaskedLM"]), "encoder"),
        (AutoConfig.for_model("bert", architectures=["BertLMHeadModel"]), "decoder"),
        (AutoConfig.for_model("qwen2"), "decoder"),
        (AutoConfig.for_model("modernbert", architectures=["ModernBertForSequenceClassification"]), "encoder"),
        (AutoConfig.for_model("modernbert", architectures=["ModernBertModel"]), "encoder"),
        (AutoConfig.for_model("bert", architectures=["BertForTokenClassification"]), "encoder"),
        (AutoConfig.for_model("gpt2", architectures=["GPT2Model"]), "conv1d_decoder"),
        (AutoConfig.for_model("gemma3", architectures=["Gemma3ForConditionalGeneration"]), "decoder"),
        (T5, "encoder_decoder"),
        (AutoConfig.for_model("t5"), "encoder_decoder"),
        (AutoConfig.for_model("bart", architectures=["BartForSequenceClassification"]), "encoder_decoder"),
        (AutoConfig.for_model("bart", is_encoder_decoder=False, architectures=["BartForCausalLM"]), "decoder"),
        (AutoConfig.for_model("t5", architectures=["T5EncoderModel"]), "encoder"),
    ],
)
def test_model_kind_is_that_of_its_config(model, kind):
    assert model_kind(model) == kind


def test_every_scheme_says_what_it_goes_with_and_why_not_otherwise():
    assert set(PAIRINGS) == set(QuantizationScheme.__args__)
    for pairing in PAIRINGS.values():
        assert {*pairing.kinds, *pairing.else_} == {"decoder", "conv1d_decoder", "encoder"}
        assert not {*pairing.kinds} & {*pairing.else_}


@pytest.mark.parametrize("scheme", ["int8_weight_only", "int8_dynamic", "onnx_float32", "onnx_int8", "onnx_int4"])
@pytest.mark.parametrize("model", [LLAMA, BERT, None])
def test_pairings_that_work_pass(scheme, model):
    check_pairings(config(scheme), model)


@pytest.mark.parametrize(
    ("scheme", "model", "words"),
    [
        ("int8_weight_only", GPT2, ["int8_weight_only", "gpt2", "Conv1D", "onnx_int8"]),
        ("int8_dynamic", GPT2, ["int8_dynamic", "Conv1D"]),
        ("int4_qat", BERT, ["int4_qat", "bert", "next tokens", "onnx_int8"]),
        ("onnx_int8", T5, ["t5", "encoder and decoder", "no scheme"]),
        (
            "int4_qat",
            AutoConfig.for_model("llama", hidden_size=48, num_attention_heads=2),
            ["int4_qat", "hidden_size=48", "32", "onnx_int4"],
        ),
    ],
)
def test_pairings_that_cannot_be_are_refused(scheme, model, words):
    with pytest.raises(ConfigError) as caught:
        check_pairings(config("onnx_int8", scheme), model)
    assert all(word in str(caught.value) for word in words), caught.value


@pytest.mark.parametrize(
    ("python", "words"),
    [
        (None, ["environment of its own", "pip install", "quantize.llmcompressor_python"]),
        ("/nowhere/python", ["/nowhere/python", "no program"]),
        (sys.executable, ["has no llm-compressor", "pip install"]),
    ],
)
def test_gptq_without_its_environment_is_refused_with_the_line_that_installs_it(python, words):
    for model in (LLAMA, None):
        with pytest.raises(ConfigError) as caught:
            check_pairings(config("compressed_tensors_w4a16", llmcompressor_python=python), model)
        assert all(word in str(caught.value) for word in words), caught.value
