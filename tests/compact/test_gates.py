"""Gated layers equal a model whose weights are θ_0 + σ(s)·Δθ, and cost no second copy of them."""

import copy

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.func import functional_call
from transformers import LlamaConfig, LlamaForCausalLM

from lit_align.compact import AdapterSettings, add_adapters, head_inputs, restrict, trainable
from lit_align.compact.change import Change
from lit_align.compact.gated_layers import gate_of
from lit_align.compact.gates import closed_gates, gate, layer_gates, open_gates, weight_shapes
from lit_align.compact.low_rank import LowRank
from lit_align.errors import ModelError, TrainingError
from lit_align.masks import ParameterMask, named_shapes
from lit_align.masks.linear_layers import linear_layers, module_names
from lit_align_kernels.benchmarks.timing import peak_extra_bytes
from lit_align_kernels.token_logprobs import token_logprobs
from tests.tiny_models import tiny_model

MODELS = [("llama", True), ("llama", False), ("gpt2", True), ("mixtral", False)]
CASES = [(*model, change) for model in MODELS for change in ("full", "low-rank")]
IDS = torch.randint(3, 300, (2, 9), generator=torch.Generator().manual_seed(1))


def make_change(model: nn.Module, kind: str, size: float = 0.05) -> Change:
    """A random change of every linear layer; a full one moves everything else too."""
    g = torch.Generator().manual_seed(2)
    layers, changes = linear_layers(model), {}
    parameters = dict(model.named_parameters())
    for name, module in layers.items():
        shape = parameters[name].shape
        if kind == "full":
            changes[name] = size * torch.randn(shape, generator=g)
        else:
            rows, columns = shape if isinstance(module, nn.Linear) else shape[::-1]
            a, b = torch.randn(4, columns, generator=g), torch.randn(rows, 4, generator=g)
            changes[name] = LowRank(0.3 * a, 0.3 * b, 0.7)
    others = {
        name: parameter.detach() + size * torch.randn(parameter.shape, generator=g)
        for name, parameter in parameters.items()
        if kind == "full" and name not in layers
    }
    return Change(changes, others)


def dense(model: nn.Module, name: str, change: LowRank | torch.Tensor) -> torch.Tensor:
    if isinstance(change, torch.Tensor):
        return change
    found = change.scale * change.b @ change.a
    return found if isinstance(linear_layers(model)[name], nn.Linear) else found.t()


def changed_weights(model: nn.Module, change: Change, gates: dict) -> dict[str, torch.Tensor]:
    """The whole model's weights under every name: an adapter changes a tied head alone."""
    paths = module_names(model)
    weights = {n: p.detach() for n, p in model.named_parameters(remove_duplicate=False)}
    weights |= change.others
    for name, layer in change.layers.items():
        merged = weights[name] + gates[name] * dense(model, name, layer)
        weights[f"{paths[name]}.weight"] = merged
        if isinstance(layer, torch.Tensor):
            weights[name] = merged
    return weights


def loss_of_logits(logits: torch.Tensor) -> torch.Tensor:
    return F.cross_entropy(logits[:, :-1].flatten(0, 1).float(), IDS[:, 1:].flatten())


def loss_of_head(model: nn.Module) -> torch.Tensor:
    """As the modules compute it: the decoder's hidden states, the head on targets."""
    hidden = model.get_decoder()(input_ids=IDS).last_hidden_state[:, :-1].flatten(0, 1)
    hidden, head = head_inputs(model.get_output_embeddings(), hidden)
    return -token_logprobs(hidden, head, IDS[:, 1:].flatten()).mean()


def gradients(model: nn.Module, loss: torch.Tensor) -> dict[str, float]:
    scores = layer_gates(model).parameters()
    found = torch.autograd.grad(loss, list(scores.values()))
    return {name: float(g) for name, g in zip(scores, found, strict=True)}


def spread_scores(model: nn.Module) -> None:
    """Scores that differ, so that a mix-up of layers shows."""
    with torch.no_grad():
        for i, score in enumerate(layer_gates(model).parameters().values()):
            score.fill_(1.5 - 0.3 * (i % 7))


def expected(model: nn.Module, change: Change, scores: dict) -> tuple[float, dict[str, float]]:
    leaves = {n: torch.tensor(s, requires_grad=True) for n, s in scores.items()}
    gates = {n: torch.sigmoid(s) for n, s in leaves.items()}
    weights = changed_weights(model, change, gates)
    out = functional_call(model, weights, kwargs={"input_ids": IDS}, tie_weights=False)
    loss = loss_of_logits(out.logits)
    found = torch.autograd.grad(loss, list(leaves.values()))
    return float(loss.detach()), {n: float(g) for n, g in zip(leaves, found, strict=True)}


@pytest.mark.parametrize(("kind", "tied", "change_kind"), CASES)
def test_loss_and_gradients_of_plain_weights(kind, tied, change_kind):
    model = tiny_model(kind, tied=tied)
    plain, change = copy.deepcopy(model), make_change(model, change_kind)
    gates = gate(model, copy.deepcopy(change))
    spread_scores(model)
    loss, grads = expected(plain, change, gates.scores())
    assert set(grads) == set(linear_layers(plain))
    assert min(abs(g) for g in grads.values()) > 1e-7  # every layer counts
    for found in (loss_of_head(model), loss_of_logits(model(input_ids=IDS).logits)):
        assert float(found) == pytest.approx(loss, rel=1e-6)
        assert gradients(model, found) == pytest.approx(grads, rel=2e-3, abs=1e-7)


@pytest.mark.parametrize("change_kind", ["full", "low-rank"])
def test_gradients_by_finite_differences(change_kind):
    """Independent of autograd: in fp64, by moving one score."""
    model = tiny_model().double()
    gate(model, make_change(model, change_kind))
    spread_scores(model)
    grads = gradients(model, loss_of_logits(model(input_ids=IDS).logits.double()))
    scores = layer_gates(model).parameters()
    for name in ("model.embed_tokens.weight", "model.layers.1.mlp.down_proj.weight"):
        middle, sides, losses = float(scores[name]), [], []
        for step in (-0.02, 0.02):
            with torch.no_grad():
                scores[name].fill_(middle + step)
                sides.append(float(scores[name]))
                logits = model(input_ids=IDS).logits[:, :-1].flatten(0, 1)
                losses.append(float(F.cross_entropy(logits, IDS[:, 1:].flatten())))
                scores[name].fill_(middle)
        slope = (losses[1] - losses[0]) / (sides[1] - sides[0])
        assert grads[name] == pytest.approx(slope, rel=2e-3)


@pytest.mark.parametrize(("kind", "tied", "change_kind"), CASES)
def test_closed_gates_are_the_base_and_open_ones_the_change(kind, tied, change_kind):
    model = tiny_model(kind, tied=tied)
    plain, change = copy.deepcopy(model), make_change(model, change_kind)
    gate(model, change)
    with torch.no_grad():
        base = plain(input_ids=IDS).logits
        with closed_gates(model):
            assert torch.equal(model(input_ids=IDS).logits, base)
            assert torch.equal(loss_of_head(model), loss_of_head(plain))
        weights = changed_weights(plain, change, dict.fromkeys(change.layers, 1.0))
        tuned = functional_call(plain, weights, kwargs={"input_ids": IDS}, tie_weights=False).logits
        with open_gates(model, 1.0):
            torch.testing.assert_close(model(input_ids=IDS).logits, tuned, rtol=1e-4, atol=2e-5)
        assert (tuned - base).abs().max() > 0.01
        assert not torch.equal(model(input_ids=IDS).logits, base)  # open again


def test_only_scores_train_one_a_layer():
    model = tiny_model()
    shapes = named_shapes(model)
    gates = gate(model, make_change(model, "full"), initial_score=4.0)
    trained = dict(trainable(model))
    assert len(trained) == len(gates.modules) == 15  # 7 a block, and the head
    assert all(p.shape == () and p.dtype == torch.float32 for p in trained.values())
    assert list(gates.gates().values()) == pytest.approx([0.98201] * 15, abs=1e-5)
    assert weight_shapes(model) == shapes
    loss_of_head(model).backward()
    assert all(p.grad is None for p in model.parameters() if not p.requires_grad)


def test_layers_that_did_not_change_have_no_gate():
    model = tiny_model()
    change = make_change(model, "full")
    name = "model.layers.0.mlp.up_proj.weight"
    del change.layers[name]
    gates = gate(model, change)
    assert name not in gates.scores() and len(gates.scores()) == 14
    assert type(model.model.layers[0].mlp.up_proj) is nn.Linear


def test_the_look_up_of_a_tied_embedding_stands_under_the_heads_gate():
    model = tiny_model()
    name, embedding = "model.embed_tokens.weight", model.get_input_embeddings()
    base, change = embedding.weight.detach().clone(), make_change(model, "full")
    gate(model, change, initial_score=0.0)
    assert embedding.score is model.lm_head.score
    row = base[5] + 0.5 * change.layers[name][5]
    torch.testing.assert_close(embedding(torch.tensor(5)), row)
    adapted = tiny_model()
    gate(adapted, make_change(adapted, "low-rank"), initial_score=0.0)
    assert type(adapted.get_input_embeddings()) is nn.Embedding
    assert torch.equal(adapted.get_input_embeddings()(torch.tensor(5)), base[5])


class ScaledEmbedding(nn.Embedding):
    """As Gemma's: a forward of its own."""

    def forward(self, input_ids):
        return super().forward(input_ids) * 3.0


def test_an_embedding_with_a_forward_of_its_own():
    model = tiny_model()
    model.get_input_embeddings().__class__ = ScaledEmbedding
    plain, change = copy.deepcopy(model), make_change(model, "full")
    gates = gate(model, change)
    spread_scores(model)
    loss, grads = expected(plain, change, gates.scores())
    found = loss_of_head(model)
    assert float(found) == pytest.approx(loss, rel=1e-6)
    assert gradients(model, found) == pytest.approx(grads, rel=2e-3, abs=1e-7)


@pytest.mark.parametrize("change_kind", ["full", "low-rank"])
def test_gradient_checkpointing_changes_nothing(change_kind):
    found = []
    for enabled in (False, True):
        model = tiny_model().train()
        gate(model, make_change(model, change_kind))
        if enabled:
            model.gradient_checkpointing_enable({"use_reentrant": False})
        found.append(gradients(model, loss_of_head(model)))
    assert found[0] == found[1]


@pytest.mark.parametrize("kind", ["llama", "gpt2"])
@pytest.mark.parametrize("change_kind", ["full", "low-rank"])
def test_autocast_follows_fp32(change_kind, kind):
    model = tiny_model(kind)
    gate(model, make_change(model, change_kind))
    exact = gradients(model, loss_of_head(model))
    with torch.autocast("cpu", torch.bfloat16):
        loss = loss_of_head(model)
    largest = max(abs(g) for g in exact.values())
    assert gradients(model, loss) == pytest.approx(exact, abs=0.03 * largest)


def test_the_change_is_used_not_copied():
    model = tiny_model()
    change = make_change(model, "full")
    gates = gate(model, change)
    for name, module in gates.modules.items():
        assert gate_of(module).change is change.layers[name]
    assert gate_of(model.get_input_embeddings()) is gate_of(model.lm_head)


@pytest.mark.parametrize("change_kind", ["full", "low-rank"])
def test_no_second_copy_of_the_weights(change_kind):
    """Peak memory of forward and backward, counted by the allocator, beyond a frozen model's."""
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=64, hidden_size=64, intermediate_size=128, num_hidden_layers=12,
        num_attention_heads=4, num_key_value_heads=2, tie_word_embeddings=False,
    )  # fmt: skip
    model = LlamaForCausalLM(config)
    change = make_change(model, change_kind)
    bytes_of_weights = sum(4 * p.numel() for p in model.parameters())
    largest = 4 * 64 * 128
    gate(model, change)

    def step(ids: torch.Tensor) -> None:
        decoder = model.get_decoder()
        embedded = model.get_input_embeddings()(ids).detach().requires_grad_()
        hidden = decoder(inputs_embeds=embedded, use_cache=False).last_hidden_state.flatten(0, 1)
        hidden, head = head_inputs(model.get_output_embeddings(), hidden)
        token_logprobs(hidden, head, ids.flatten()).sum().backward()
        model.zero_grad()

    ids = torch.tensor([[3]])
    for _ in range(2):
        step(ids)
    gated = peak_extra_bytes(step, ids, torch.device("cpu"))
    with closed_gates(model):
        frozen = peak_extra_bytes(step, ids, torch.device("cpu"))
    # One layer's merged weight at a time (of the head also its dense gradient), and activations.
    assert gated - frozen < 4 * largest < 0.1 * bytes_of_weights


def test_copies_and_casts_keep_scores_in_fp32():
    model = tiny_model()
    gate(model, make_change(model, "full"))
    other = copy.deepcopy(model)
    layer_gates(other).parameters()["model.embed_tokens.weight"].data.fill_(-50.0)
    assert other.get_input_embeddings().score is other.lm_head.score
    assert layer_gates(model).scores()["model.embed_tokens.weight"] == 4.0
    with open_gates(other, 0.0):  # the copy has a switch of its own
        assert not model.lm_head.is_closed()
    other.to(torch.bfloat16)
    assert other.lm_head.score.dtype == torch.float32
    assert gate_of(other.lm_head).change.dtype == torch.bfloat16
    assert gate_of(model.lm_head).change.dtype == torch.float32
    assert loss_of_logits(other(input_ids=IDS).logits).isfinite()


def test_closing_gates_inside_an_unfinished_graph_is_refused():
    """Norms trade places with the base's: a waiting backward must not go on with those."""
    model = tiny_model()
    gate(model, make_change(model, "full"))
    loss = loss_of_head(model)
    with closed_gates(model):
        pass
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()


def test_what_cannot_be_gated():
    model = tiny_model()
    change = make_change(model, "full")
    name = "model.layers.0.mlp.up_proj.weight"
    with pytest.raises(ModelError, match=r"up_proj.weight is \(56, 32\) in the model and \(3, 3\)"):
        gate(model, Change({name: torch.zeros(3, 3)}, {}))
    wrong = LowRank(torch.zeros(2, 56), torch.zeros(32, 2), 1.0)
    with pytest.raises(ModelError, match=r"\(32, 56\) in the change"):
        gate(model, Change({name: wrong}, {}))
    with pytest.raises(ModelError, match="no linear layer"):
        gate(model, Change({"model.norm.weight": torch.zeros(32)}, {}))
    with pytest.raises(ModelError, match=r"model.norm.weight.*not in that shape"):
        gate(model, Change({}, {"model.norm.weight": torch.zeros(3)}))
    gate(model, change)
    with pytest.raises(ModelError, match="gated or restricted already"):
        gate(model, change)
    restricted = restrict(tiny_model(), ParameterMask.full(tiny_model()))
    with pytest.raises(ModelError, match="gated or restricted already"):
        gate(restricted, change)
    adapted = tiny_model()
    add_adapters(adapted, AdapterSettings(rank=2))
    with pytest.raises(ModelError, match="has adapters"):
        gate(adapted, change)
    with pytest.raises(ModelError, match="has no gates"):
        layer_gates(tiny_model())
    model = tiny_model()
    gate(model, change, keep_base=False)
    with pytest.raises(TrainingError, match="keep_base=True"), closed_gates(model):
        pass
