"""Log-probs from decoder and head are the model's own, or the model is refused."""

import pytest
import torch
from transformers import (
    AutoModelForCausalLM,
    BertConfig,
    CohereConfig,
    FalconH1Config,
    GraniteConfig,
    HyperCLOVAXConfig,
    MptConfig,
)

from lit_align.batch import PackedBatch
from lit_align.errors import ModelError
from lit_align.modules import SupervisedFineTuning
from lit_align.modules.forward import check_head, head_settings, target_hidden
from tests.tiny_models import tiny_model, tiny_tokenizer
from tests.training_runs import instructions, trainer

SIZES = {
    "vocab_size": 384, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 1,
    "num_attention_heads": 4, "max_position_embeddings": 64, "bos_token_id": 1, "eos_token_id": 2,
    "pad_token_id": 0,
}  # fmt: skip
MAMBA = {
    "mamba_d_ssm": 32, "mamba_n_heads": 4, "mamba_d_head": 8, "mamba_d_state": 8,
    "mamba_n_groups": 1, "num_key_value_heads": 2, "head_dim": 8,
}  # fmt: skip
KNOWN = {
    "granite": lambda: GraniteConfig(**SIZES, logits_scaling=3.0),
    "cohere": lambda: CohereConfig(**SIZES, logit_scale=3.0),
    "falcon_h1": lambda: FalconH1Config(**SIZES, **MAMBA, lm_head_multiplier=3.0),
}
REFUSED = {
    "hyperclovax": lambda: HyperCLOVAXConfig(**SIZES, logits_scaling=4.0),
    "mpt": lambda: MptConfig(
        vocab_size=384, d_model=32, n_heads=4, n_layers=1, max_seq_len=64, logit_scale=2.0
    ),
    "bert": lambda: BertConfig(**SIZES, is_decoder=True),
}


def build(config, dtype=torch.float32):
    """A random model whose logits are large enough for a scale to show."""
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(config, dtype=dtype).eval()
    with torch.no_grad():
        model.get_output_embeddings().weight.mul_(10)
    return model


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("kind", KNOWN)
def test_known_scales_pass(kind, dtype):
    model = build(KNOWN[kind](), dtype)
    assert head_settings(model)["logit_scale"] == pytest.approx(1 / 3 if kind == "granite" else 3)
    check_head(model)


@pytest.mark.parametrize("kind", ["llama", "gpt2", "mixtral"])
def test_plain_heads_pass(kind):
    check_head(tiny_model(kind).eval())


@pytest.mark.parametrize("kind", REFUSED)
def test_other_heads_are_refused_by_name(kind):
    model = build(REFUSED[kind]())
    with pytest.raises(ModelError, match=type(model).__name__):
        check_head(model)


def test_a_run_with_such_a_model_does_not_start(tmp_path):
    build(REFUSED["hyperclovax"]()).save_pretrained(tmp_path / "model")
    tiny_tokenizer().save_pretrained(tmp_path / "model")
    with pytest.raises(ModelError, match="HyperCLOVAX"):
        trainer(tmp_path).fit(SupervisedFineTuning(str(tmp_path / "model")), instructions(4))


def test_rows_that_are_longer_than_the_positions_name_the_way_out():
    model = tiny_model("gpt2")  # 512 positions
    ids = torch.full((1, 513), 5)
    batch = PackedBatch(
        input_ids=ids,
        position_ids=torch.arange(513)[None],
        attention_mask=torch.ones_like(ids),
        hidden_index=torch.tensor([0]),
        target_ids=torch.tensor([5]),
        sequence_index=torch.tensor([0]),
        token_weights=torch.ones(1),
        sequence_roles=torch.tensor([0]),
        row_ids=torch.tensor([0]),
    )
    with pytest.raises(ModelError, match=r"513 tokens and .* 512 positions: set"):
        target_hidden(model, batch)
