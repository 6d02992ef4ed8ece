"""Adapters in a model: what peft computes, through the decoder and the head that modules call."""

import copy

import pytest
import torch
from peft import AdaLoraConfig, LoraConfig, get_peft_model

from lit_align.compact import (
    AdapterSettings,
    add_adapters,
    has_adapters,
    head_inputs,
    merge_adapters,
    reference_policy,
    trainable,
    without_adapters,
)
from lit_align.compact.adapters import adapted_layers, adapter_share
from lit_align.compact.rank_allocation import orthogonality
from lit_align.errors import MaskError, ModelError, TrainingError
from lit_align.language_model import load_language_model, save_language_model
from lit_align.masks import MaskMetadata, ParameterMask, named_shapes
from lit_align.masks.granularity import Selection
from lit_align.masks.linear_layers import module_names
from lit_align_kernels.token_logprobs import token_logprobs
from tests.tiny_models import tiny_model, tiny_tokenizer

HEAD, EMBEDDING = "lm_head", "model.embed_tokens.weight"
MODELS = [("llama", True), ("llama", False), ("gpt2", True)]


def randomise(model, seed=0):
    """Values for all factors: as they begin, B or E is 0 and hides what A does."""
    g = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for _, parameter in trainable(model):
            parameter.copy_(0.1 * torch.randn(parameter.shape, generator=g))


def adapted(architecture="llama", tied=True, seed=0, **settings):
    model = tiny_model(architecture, tied=tied)
    add_adapters(model, AdapterSettings(**{"rank": 4, "alpha": 8, "dropout": 0.0} | settings))
    randomise(model, seed)
    return model


def token_ids(rows=2, length=9):
    return torch.randint(3, 300, (rows, length), generator=torch.Generator().manual_seed(1))


def peft_config(kind, targets):
    common = {"lora_alpha": 8, "lora_dropout": 0.0, "target_modules": targets}
    if kind == "lora":
        return LoraConfig(r=4, **common)
    return AdaLoraConfig(init_r=6, target_r=4, total_step=10, **common)


def next_token_logps(logits, ids):
    return logits.log_softmax(-1)[:, :-1].gather(2, ids[:, 1:, None]).flatten()


def by_decoder_and_head(model, ids):
    """As the modules do it: the head's product on the targets alone, never as all logits."""
    hidden = model.get_decoder()(input_ids=ids).last_hidden_state[:, :-1].flatten(0, 1)
    return token_logprobs(
        *head_inputs(model.get_output_embeddings(), hidden), ids[:, 1:].reshape(-1)
    )


@pytest.mark.filterwarnings("ignore:Model has:UserWarning", "ignore:fan_in:UserWarning")
@pytest.mark.parametrize("kind", ["lora", "adalora"])
@pytest.mark.parametrize(("architecture", "tied"), MODELS)
def test_log_probs_and_gradients_are_those_of_pefts_own_model(architecture, tied, kind):
    base = tiny_model(architecture, tied=tied)
    theirs = get_peft_model(base, peft_config(kind, list(module_names(base).values())))
    randomise(theirs)
    ours = adapted(architecture, tied, kind=kind)
    ids, weights = token_ids(), torch.linspace(-1, 1, 16)
    expected = next_token_logps(theirs(input_ids=ids).logits, ids)
    found = by_decoder_and_head(ours, ids)
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)
    (weights * expected).sum().backward()
    (weights * found).sum().backward()
    gradients = {n.removeprefix("base_model.model."): p.grad for n, p in trainable(theirs)}
    for name, parameter in trainable(ours):
        scale = float(gradients[name].abs().max())
        assert scale > 0, name  # every adapter is used, the head's too
        torch.testing.assert_close(parameter.grad, gradients[name], rtol=1e-4, atol=1e-5 * scale)
    assert len(gradients) == len(list(trainable(ours)))


def test_the_gradient_of_the_heads_b_comes_through_every_implementation():
    """16 tokens at once, and in blocks so small that entries of a block are gathered."""
    model, ids = adapted(), token_ids()
    head = model.get_output_embeddings()
    hidden = model.get_decoder()(input_ids=ids).last_hidden_state[:, :-1].flatten(0, 1).detach()
    gradients = []
    for few_bytes in (None, 1):
        model.zero_grad()
        x, handle = head_inputs(head, hidden)
        targets = ids[:, 1:].reshape(-1)
        token_logprobs(x, handle, targets, max_logits_bytes=few_bytes).sum().backward()
        gradients.append(head.lora_B["default"].weight.grad.clone())
    torch.testing.assert_close(*gradients)


def test_a_tied_head_is_adapted_as_a_head_alone():
    model, ids = adapted(), token_ids()
    embedding = model.get_input_embeddings()
    assert type(embedding) is torch.nn.Embedding
    assert torch.equal(embedding(ids), tiny_model().get_input_embeddings()(ids))
    assert EMBEDDING in adapted_layers(model)
    assert model.lm_head.get_base_layer().weight is embedding.weight
    only_head = adapted(layers=[HEAD])
    hidden = only_head.get_decoder()(input_ids=ids).last_hidden_state
    assert torch.equal(hidden, tiny_model().get_decoder()(input_ids=ids).last_hidden_state)
    with torch.no_grad():
        assert not torch.equal(only_head(input_ids=ids).logits, tiny_model()(input_ids=ids).logits)


@pytest.mark.parametrize("reference", [without_adapters, reference_policy])
@torch.no_grad()
def test_the_reference_is_the_base_to_the_bit(reference):
    model, ids = adapted(), token_ids()
    before = by_decoder_and_head(model, ids)
    with reference(model):
        assert torch.equal(by_decoder_and_head(model, ids), by_decoder_and_head(tiny_model(), ids))
    assert torch.equal(by_decoder_and_head(model, ids), before)
    assert not torch.equal(before, by_decoder_and_head(tiny_model(), ids))


def test_what_trains_stays_as_it_is_inside_the_reference():
    model = adapted()
    model.lm_head.lora_A["default"].weight.requires_grad_(False)
    names = [n for n, _ in trainable(model)]
    with without_adapters(model), pytest.raises(ZeroDivisionError):
        raise ZeroDivisionError
    assert [n for n, _ in trainable(model)] == names
    assert not model.lm_head.disable_adapters


@pytest.mark.parametrize("kind", ["lora", "adalora"])
def test_adapters_are_fp32_in_a_16_bit_model_and_stay_so(kind):
    model = tiny_model().to(torch.bfloat16)
    add_adapters(model, AdapterSettings(kind=kind, rank=4))
    randomise(model)
    before = {n: p.clone() for n, p in trainable(model)}
    assert len(before) == (30 if kind == "lora" else 45)  # not the count of ranks, which peft frees
    by_decoder_and_head(model, token_ids()).sum().backward()
    model.to(torch.float16)
    for name, parameter in trainable(model):
        assert parameter.dtype == torch.float32 and torch.equal(parameter, before[name])
    assert model.get_input_embeddings().weight.dtype == torch.float16
    logps = by_decoder_and_head(model.to(torch.bfloat16), token_ids())
    logps.sum().backward()
    assert all(p.grad.dtype == torch.float32 for _, p in trainable(model))


def test_initial_values_are_drawn_in_fp32_under_a_16_bit_default():
    torch.set_default_dtype(torch.bfloat16)
    try:
        model = tiny_model().float()
        add_adapters(model, AdapterSettings(rank=4))
        assert torch.get_default_dtype() == torch.bfloat16
    finally:
        torch.set_default_dtype(torch.float32)
    a = model.lm_head.lora_A["default"].weight
    assert not torch.equal(a, a.bfloat16().float())


@pytest.mark.filterwarnings("ignore:Model has:UserWarning", "ignore:fan_in:UserWarning")
@pytest.mark.parametrize("kind", ["lora", "adalora"])
@pytest.mark.parametrize(("architecture", "tied"), MODELS)
def test_merging_gives_a_plain_model_with_the_same_logits(architecture, tied, kind, tmp_path):
    model, ids = adapted(architecture, tied, kind=kind), token_ids()
    expected = model(input_ids=ids).logits.detach()
    merge_adapters(model)
    assert not has_adapters(model) and all(p.requires_grad for p in model.parameters())
    torch.testing.assert_close(model(input_ids=ids).logits, expected, rtol=1e-5, atol=1e-5)
    names = set(named_shapes(tiny_model(architecture, tied=tied)))
    assert set(named_shapes(model)) == names | ({"lm_head.weight"} if tied else set())
    embedding = tiny_model(architecture, tied=tied).get_input_embeddings().weight
    assert torch.equal(model.get_input_embeddings().weight, embedding)
    save_language_model(model, tiny_tokenizer(), tmp_path / "merged")
    again, _ = load_language_model(tmp_path / "merged")
    torch.testing.assert_close(again(input_ids=ids).logits, expected, rtol=1e-5, atol=1e-5)


def test_a_copy_has_adapters_of_its_own():
    model = adapted()
    twin = copy.deepcopy(model)
    merge_adapters(twin)
    assert has_adapters(model) and not has_adapters(twin)
    randomise(model, seed=5)
    logps = by_decoder_and_head(model, token_ids())
    assert not torch.allclose(logps, by_decoder_and_head(twin, token_ids()))


# ---- which layers --------------------------------------------------------------------------------


def layer_mask(*names, partly=(), like=None):
    """A mask of whole layers of the tiny model, or of the one in the folder `like`."""
    shapes = named_shapes(tiny_model() if like is None else load_language_model(like)[0])
    kinds = {n: Selection.all if n in names else Selection.none for n in shapes}
    selections = {n: kinds[n](shape) for n, shape in shapes.items()}
    for name in partly:
        flags = torch.zeros(shapes[name], dtype=torch.bool)
        flags[0] = True
        selections[name] = Selection.of_dense(flags)
    return ParameterMask(selections, MaskMetadata("test", "layer"))


UP, QUERY = "model.layers.1.mlp.up_proj.weight", "model.layers.0.self_attn.q_proj.weight"


@pytest.mark.parametrize(
    ("layers", "expected"),
    [
        ([UP], [UP]),
        ([UP, UP], [UP]),
        (["model.layers.1.mlp.up_proj"], [UP]),
        (["mlp.up_proj"], [UP.replace("1", "0"), UP]),
        (["lm_head"], [EMBEDDING]),
        ([EMBEDDING, "layers.0.self_attn.q_proj"], [QUERY, EMBEDDING]),
    ],
)
def test_layers_by_name_and_by_the_end_of_their_path(layers, expected):
    assert adapted_layers(adapted(layers=layers)) == expected


def test_by_default_every_linear_layer_and_the_head():
    assert adapted_layers(adapted()) == list(module_names(tiny_model()))
    assert len(adapted_layers(adapted("mixtral", tied=False))) == 9  # 2 · (q k v o) and the head


def test_the_layers_of_a_mask(tmp_path):
    mask = layer_mask(QUERY, EMBEDDING)
    mask.save(tmp_path / "mask")
    by_file = adapted(mask=str(tmp_path / "mask"))
    assert adapted_layers(by_file) == [QUERY, EMBEDDING]
    given = tiny_model()
    add_adapters(given, AdapterSettings(rank=4), mask)
    assert adapted_layers(given) == [QUERY, EMBEDDING]
    # A and B of both: 4 · (32 + 32) and 4 · (384 + 32).
    total = sum(p.numel() for p in tiny_model().parameters())
    assert adapter_share(given) == pytest.approx((4 * 64 + 4 * 416) / total)


@pytest.mark.parametrize(
    ("mask", "message"),
    [
        (layer_mask(QUERY, partly=[UP]), f"selects a part of '{UP}'.*granularity layer"),
        (layer_mask("model.norm.weight"), "'model.norm.weight', which is no linear layer"),
        (layer_mask(), "selects no layer"),
        (ParameterMask({"w": Selection.all((2, 2))}), "'w', which the model does not have"),
    ],
)
def test_masks_that_no_adapter_can_follow(mask, message):
    model = tiny_model()
    with pytest.raises(MaskError, match=message):
        add_adapters(model, AdapterSettings(), mask)
    assert not has_adapters(model)


@pytest.mark.parametrize("settings", [{"mask": "no file is read"}, {"layers": ["lm_head"]}])
def test_layers_are_named_once(settings):
    with pytest.raises(MaskError, match=r"leave out adapter.mask and adapter.layers"):
        add_adapters(tiny_model(), AdapterSettings(**settings), layer_mask(QUERY))


def test_a_layer_that_does_not_exist_is_named_with_those_that_do():
    with pytest.raises(ModelError, match=r"'c_attn'.*down_proj, gate_proj.*15 layers"):
        adapted(layers=["c_attn"])


def test_adapters_upon_adapters():
    with pytest.raises(ModelError, match="already"):
        add_adapters(adapted(), AdapterSettings())


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"rank": 0}, "rank is 0: at least 1"),
        ({"alpha": 0.0}, "alpha"),
        ({"dropout": 1.0}, "dropout"),
        ({"kind": "dora"}, "'dora': choose one of lora, adalora"),
        ({"quantization": "int8"}, "choose one of none, nf4"),
        ({"layers": []}, "layers is empty"),
        ({"layers": ["lm_head"], "mask": "m"}, "either layers or mask"),
        ({"kind": "adalora", "initial_rank": 32}, "more than rank"),
        ({"kind": "adalora", "rank_warmup": 0.5, "rank_final": 0.5}, "below 1"),
        ({"kind": "adalora", "rank_interval": 0}, "rank_interval"),
    ],
)
def test_settings_that_cannot_be(settings, message):
    with pytest.raises(TrainingError, match=message):
        AdapterSettings(**settings)


def test_a_model_with_adapters_is_not_saved_as_a_plain_one(tmp_path):
    with pytest.raises(ModelError, match="merge them"):
        save_language_model(adapted(), tiny_tokenizer(), tmp_path / "model")
    assert not (tmp_path / "model").exists()


def test_the_regulariser_of_factors_by_hand():
    """A Aᵀ = diag(4, 1) and Bᵀ B = I in every layer: norms of 3 and 0, a mean of 1.5."""
    model = adapted(kind="adalora", rank=1, initial_rank=2, orthogonality=0.5)
    with torch.no_grad():
        for name, parameter in trainable(model):
            parameter.zero_()
            if "lora_A" in name:
                parameter[0, 0], parameter[1, 1] = 2.0, 1.0
            elif "lora_B" in name:
                parameter[0, 0] = parameter[1, 1] = 1.0
    assert float(orthogonality(model)) == pytest.approx(0.5 * 1.5)
