"""Where heads stand, found out by running the models: only the head's own output may move."""

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM

from lit_align.errors import MaskError
from lit_align.masks import HeadLayout
from lit_align.masks.projections import FUSED
from tests.attention_models import LAYOUTS, attention_model

OUTPUTS = ("o_proj", "c_proj", "dense", "out_proj")  # what a block's heads are joined by


def head_outputs(model, layout) -> torch.Tensor:
    """What the heads of the first block give: (tokens, num_heads, head_dim)."""
    attention = layout.blocks[0][0].name.rpartition(".weight")[0].rpartition(".")[0]
    joined = next(
        child for name, child in model.get_submodule(attention).named_children() if name in OUTPUTS
    )
    seen = {}
    handle = joined.register_forward_pre_hook(lambda _, args: seen.update(x=args[0].detach()))
    with torch.no_grad():
        model(torch.tensor([[5, 9, 3, 200, 17, 42]]))
    handle.remove()
    return seen["x"].reshape(6, layout.num_heads, layout.head_dim)


@pytest.mark.parametrize("name", LAYOUTS)
@pytest.mark.parametrize("part", [0, 1, 2], ids=["q", "k", "v"])
def test_a_heads_rows_move_its_own_output_and_no_other(name, part):
    model = attention_model(name)
    layout = HeadLayout.from_model(model)
    before = head_outputs(model, layout)
    projection = layout.blocks[0][part]
    weight = model.get_parameter(projection.name)
    for unit, start in enumerate(projection.starts):
        kept = weight.detach().clone()
        with torch.no_grad():
            rows = weight.narrow(projection.axis, start, layout.head_dim)
            rows.copy_(rows.flip(projection.axis) * 1.5)
        moved = (head_outputs(model, layout) - before).abs().amax((0, 2)) > 1e-6
        with torch.no_grad():
            weight.copy_(kept)
        own = range(unit, unit + 1)
        if part:
            own = range(unit * layout.heads_per_group, (unit + 1) * layout.heads_per_group)
        assert moved.nonzero().flatten().tolist() == list(own)


@pytest.mark.parametrize("name", LAYOUTS)
def test_all_heads_together_are_all_rows_once(name):
    model = attention_model(name)
    layout = HeadLayout.from_model(model)
    rows: dict[str, list[int]] = {}
    for block in layout.blocks:
        for projection in block:
            heads = torch.arange(len(projection.starts)).numpy()
            rows.setdefault(projection.name, []).extend(
                projection.rows(heads, layout.head_dim).ravel().tolist()
            )
    axes = {p.name: p.axis for block in layout.blocks for p in block}
    for parameter, found in rows.items():
        assert sorted(found) == list(range(model.get_parameter(parameter).shape[axes[parameter]]))
    assert layout.total_heads == 8 and layout.block_number(1) == 1


def test_every_fused_layout_is_tried():
    tried = {model_type for model_type, _ in LAYOUTS.values()}
    known = {model_type for types in FUSED.values() for model_type in types}
    assert known - tried == {"openai-gpt", "gpt_neox_japanese"}  # as gpt2 and gpt_neox


def test_codegens_own_order_under_phis_name_is_refused():
    config = AutoConfig.for_model("codegen", n_embd=32, n_head=4, n_layer=1, rotary_dim=4)
    model = AutoModelForCausalLM.from_config(config)
    with pytest.raises(MaskError, match="'codegen' orders q, k and v in qkv_proj is not known"):
        HeadLayout.from_model(model)


@pytest.mark.parametrize(
    ("model_type", "message"),
    [("mamba", "has no attention heads"), ("deepseek_v3", "cannot be told apart")],
)
def test_models_without_separable_heads_are_refused(model_type, message):
    small = {"hidden_size": 32, "num_hidden_layers": 1, "vocab_size": 16}
    small |= {"intermediate_size": 16, "num_attention_heads": 4, "num_key_value_heads": 4}
    if model_type == "mamba":
        del small["num_attention_heads"], small["num_key_value_heads"]
    config = AutoConfig.for_model(model_type, **small)
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config)
    with pytest.raises(MaskError, match=message):
        HeadLayout.from_model(model)


def test_shapes_that_contradict_the_config_are_refused():
    model = attention_model("phi3")
    model.config.num_key_value_heads = 4
    with pytest.raises(MaskError, match="its config says"):
        HeadLayout.from_model(model)
    model.config.num_key_value_heads = 3
    with pytest.raises(MaskError, match="4 query heads do not share 3"):
        HeadLayout.from_model(model)
