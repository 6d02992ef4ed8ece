import pytest
from torch import nn

from lit_align.errors import ModelError
from lit_align.masks.linear_layers import linear_layers, module_names
from tests.tiny_models import tiny_model


def test_llama_has_seven_a_block_and_the_head():
    names = list(linear_layers(tiny_model("llama", tied=False)))
    assert len(names) == 2 * 7 + 1
    assert names[0] == "model.layers.0.self_attn.q_proj.weight"
    assert names[-1] == "lm_head.weight"


def test_a_tied_head_goes_by_the_embeddings_name_and_is_the_head():
    model = tiny_model("llama", tied=True)
    layers = linear_layers(model)
    assert layers["model.embed_tokens.weight"] is model.lm_head
    assert module_names(model)["model.embed_tokens.weight"] == "lm_head"
    assert "model.norm.weight" not in layers


def test_conv1d_counts_and_fused_experts_do_not():
    gpt2 = linear_layers(tiny_model("gpt2"))
    assert "transformer.h.0.attn.c_attn.weight" in gpt2
    assert len(gpt2) == 2 * 4 + 1
    mixtral = linear_layers(tiny_model("mixtral"))
    assert all(module.weight.ndim == 2 for module in mixtral.values())


def test_a_model_without_linear_layers_is_refused():
    with pytest.raises(ModelError, match="no linear layer"):
        linear_layers(nn.Sequential(nn.LayerNorm(4)))
