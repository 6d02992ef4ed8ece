"""Compact training equals dense training with masked gradients and masked decay."""

import copy

import pytest
import torch
from torch import nn

from lit_align.compact import head_handle, links, reference_policy, restrict, sync
from lit_align.compact.state import write_through
from lit_align.errors import MaskError, ModelError, TrainingError
from lit_align.masks import ParameterMask, conv1d_row_axes, named_shapes, select
from lit_align.optim import MaskedAdamW
from lit_align_kernels.token_logprobs import token_logprobs
from tests.tiny_models import tiny_model

KINDS = ("llama", "gpt2", "mixtral")


def make_mask(model: nn.Module, ratio: float = 0.1, granularity: str = "element") -> ParameterMask:
    generator = torch.Generator().manual_seed(1)
    shapes = named_shapes(model)
    scores = {n: torch.rand(s, generator=generator) for n, s in shapes.items()}
    return select(scores, ratio, granularity=granularity, row_axes=conv1d_row_axes(model))


def loss_of(model: nn.Module, step: int) -> torch.Tensor:
    ids = torch.randint(0, 384, (2, 9), generator=torch.Generator().manual_seed(step))
    base = model.get_decoder() if hasattr(model, "get_decoder") else model.model
    hidden = base(input_ids=ids).last_hidden_state[:, :-1].flatten(0, 1)
    head = head_handle(model.get_output_embeddings())
    return -token_logprobs(hidden, head, ids[:, 1:].flatten()).mean()


def dense_masked_steps(model: nn.Module, mask: ParameterMask, steps: int, **settings) -> None:
    """The oracle: torch's AdamW on the dense model; unselected entries are put back."""
    before = {n: p.detach().clone() for n, p in model.named_parameters()}
    optimizer = torch.optim.AdamW(model.parameters(), **settings)
    for step in range(steps):
        optimizer.zero_grad()
        loss_of(model, step).backward()
        for name, parameter in model.named_parameters():
            parameter.grad.mul_(mask.dense(name))
        optimizer.step()
        with torch.no_grad():
            for name, parameter in model.named_parameters():
                parameter.copy_(torch.where(mask.dense(name), parameter, before[name]))


def compact_steps(model: nn.Module, steps: int, optimizer: torch.optim.Optimizer) -> None:
    for step in range(steps):
        optimizer.zero_grad()
        loss_of(model, step).backward()
        optimizer.step()


def trainable(model: nn.Module) -> list[nn.Parameter]:
    return [p for p in model.parameters() if p.requires_grad]


@pytest.mark.parametrize("granularity", ["element", "row", "layer"])
@pytest.mark.parametrize("kind", KINDS)
def test_ten_percent_equals_dense_masked_adamw(kind, granularity):
    dense, compact = tiny_model(kind), tiny_model(kind)
    before = {n: p.detach().clone() for n, p in compact.named_parameters()}
    mask = make_mask(dense, 0.1, granularity)
    settings = {"lr": 1e-2, "weight_decay": 0.1, "betas": (0.9, 0.98), "eps": 1e-6}
    dense_masked_steps(dense, mask, 4, **settings)
    restrict(compact, mask)
    assert sum(p.numel() for p in trainable(compact)) == mask.count()
    compact_steps(compact, 4, MaskedAdamW(trainable(compact), **settings))
    trained = dict(compact.named_parameters())
    for name, parameter in dense.named_parameters():
        chosen = mask.dense(name)
        torch.testing.assert_close(trained[name], parameter, rtol=2e-4, atol=2e-5)
        assert torch.equal(trained[name][~chosen], before[name][~chosen]), name
    moved = sum(int((trained[n] != before[n]).sum()) for n in before)
    # Experts that no token reaches and embeddings of unseen tokens still decay.
    assert moved > 0.95 * mask.count()


@pytest.mark.parametrize("kind", KINDS)
def test_full_mask_follows_torch_adamw(kind):
    dense, compact = tiny_model(kind), tiny_model(kind)
    # eps: a key bias has gradient 0 up to rounding, which Adam would blow up to full steps.
    settings = {"lr": 1e-2, "weight_decay": 0.1, "eps": 1e-6}
    dense_masked_steps(dense, ParameterMask.full(named_shapes(dense)), 4, fused=True, **settings)
    restrict(compact, ParameterMask.full(named_shapes(compact)))
    compact_steps(compact, 4, MaskedAdamW(trainable(compact), **settings))
    for (name, a), (_, b) in zip(dense.named_parameters(), compact.named_parameters(), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-6, msg=name)


@pytest.mark.parametrize("kind", KINDS)
def test_other_optimisers_write_through(kind):
    model = restrict(tiny_model(kind), make_mask(tiny_model(kind)))
    compact_steps(model, 2, torch.optim.SGD(trainable(model), lr=0.1))
    for link in links(model):
        before = link.weight.detach().clone()
        write_through([link])
        assert torch.equal(link.weight, before)


def test_tied_weights_have_one_selected_fed_by_both_uses():
    model = tiny_model("llama")
    restrict(model, make_mask(model))
    embedding, head = model.get_input_embeddings(), model.get_output_embeddings()
    assert embedding.selected is head.selected
    dense = tiny_model("llama")
    loss_of(dense, 0).backward()
    loss_of(model, 0).backward()
    entries = head_handle(head).entries
    expected = dense.get_input_embeddings().weight.grad.flatten()[entries.positions.long()]
    torch.testing.assert_close(embedding.selected.grad, expected, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("kind", KINDS)
def test_logits_head_and_loss_head_agree(kind):
    """The gradient through the model's own logits equals the one through token_logprobs."""
    grads = []
    for through_logits in (True, False):
        model = restrict(tiny_model(kind), make_mask(tiny_model(kind)))
        ids = torch.arange(20).view(2, 10) + 5
        if through_logits:
            logits = model(input_ids=ids).logits[:, :-1]
            logps = logits.log_softmax(-1).gather(-1, ids[:, 1:, None])[..., 0]
        else:
            hidden = model.get_decoder()(input_ids=ids).last_hidden_state[:, :-1]
            handle = head_handle(model.get_output_embeddings())
            logps = token_logprobs(hidden.flatten(0, 1), handle, ids[:, 1:].flatten())
        logps.sum().backward()
        grads.append([p.grad.clone() for p in trainable(model)])
    for a, b in zip(*grads, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5)


def test_state_is_the_masks_size():
    model = tiny_model("llama")
    total = sum(p.numel() for p in model.parameters())
    restrict(model, make_mask(model, 0.1))
    optimizer = MaskedAdamW(trainable(model))
    compact_steps(model, 1, optimizer)
    state = sum(t.numel() * t.element_size() for s in optimizer.state.values() for t in s.values())
    grads = sum(p.grad.numel() * p.grad.element_size() for p in trainable(model))
    assert state <= 1.05 * 0.1 * total * 8
    assert grads <= 1.05 * 0.1 * total * 4


@pytest.mark.parametrize("kind", KINDS)
def test_state_dict_has_the_bases_keys(kind, tmp_path):
    base = tiny_model(kind)
    keys = {n: t.dtype for n, t in base.state_dict().items()}
    model = restrict(tiny_model(kind), make_mask(base))
    assert {n: t.dtype for n, t in model.state_dict().items()} == keys
    compact_steps(model, 2, MaskedAdamW(trainable(model)))
    model.save_pretrained(tmp_path)
    again = type(base).from_pretrained(tmp_path)
    for name, parameter in again.named_parameters():
        assert torch.equal(parameter, dict(model.named_parameters())[name]), name


def test_loading_weights_refreshes_selected():
    model = restrict(tiny_model(), make_mask(tiny_model()))
    other = tiny_model(seed=3)
    model.load_state_dict(other.state_dict())
    for link in links(model):
        before = link.weight.detach().clone()
        write_through([link])
        assert torch.equal(link.weight, before)
    assert torch.equal(model.model.norm.weight, other.model.norm.weight)


def test_bf16_keeps_fp32_masters_and_writes_bf16():
    model = restrict(tiny_model().bfloat16(), ParameterMask.full(named_shapes(tiny_model())))
    assert all(p.dtype == torch.float32 for p in trainable(model))
    optimizer = MaskedAdamW(trainable(model), lr=1e-6)
    compact_steps(model, 3, optimizer)
    for link in links(model):
        assert torch.equal(link.weight.flatten(), link.selected.bfloat16())
    moved = sum(int((s.selected != s.state.base.float()).sum()) for s in links(model))
    assert moved > 0.5 * sum(p.numel() for p in trainable(model))  # bf16 alone would lose these


def test_to_bf16_casts_weights_alone():
    model = restrict(tiny_model(), make_mask(tiny_model()))
    masters = [p.detach().clone() for p in trainable(model)]
    model.to(torch.bfloat16)
    assert all(link.weight.dtype == torch.bfloat16 for link in links(model))
    for master, now in zip(masters, trainable(model), strict=True):
        assert now.dtype == torch.float32 and torch.equal(master, now)


@pytest.mark.parametrize("kind", KINDS)
def test_autocast_gradients_are_near_fp32(kind):
    grads = []
    for enabled in (False, True):
        model = restrict(tiny_model(kind), make_mask(tiny_model(kind), 0.3))
        with torch.autocast("cpu", torch.bfloat16, enabled=enabled):
            loss = loss_of(model, 0)
        loss.backward()
        grads.append(torch.cat([p.grad for p in trainable(model)]))
    assert all(g.dtype == torch.float32 for g in grads)
    assert torch.cosine_similarity(*grads, dim=0) > 0.97


@pytest.mark.parametrize("kind", KINDS)
def test_gradient_checkpointing_gives_equal_gradients(kind):
    grads = []
    for checkpointing in (False, True):
        model = restrict(tiny_model(kind), make_mask(tiny_model(kind)))
        model.train()
        if checkpointing:
            model.gradient_checkpointing_enable({"use_reentrant": False})
        loss_of(model, 0).backward()
        grads.append([p.grad.clone() for p in trainable(model)])
    for a, b in zip(*grads, strict=True):
        torch.testing.assert_close(a, b)


def test_deepcopy_is_independent():
    model = restrict(tiny_model(), make_mask(tiny_model()))
    twin = copy.deepcopy(model)
    before = [link.weight.detach().clone() for link in links(model)]
    compact_steps(twin, 2, torch.optim.SGD(trainable(twin), lr=0.5))
    for link, old in zip(links(model), before, strict=True):
        assert torch.equal(link.weight, old)
    for link in links(twin):
        written = link.weight.detach().clone()
        write_through([link])
        assert torch.equal(link.weight, written)
    assert twin.lm_head.selected is twin.model.embed_tokens.selected


@pytest.mark.parametrize("granularity", ["element", "row"])
@pytest.mark.parametrize("kind", KINDS)
def test_reference_policy_is_bitwise_the_base(kind, granularity):
    base = tiny_model(kind).eval()
    model = restrict(tiny_model(kind), make_mask(base, 0.1, granularity)).eval()
    compact_steps(model, 3, MaskedAdamW(trainable(model), lr=1e-2))
    ids = torch.arange(12)[None] + 3
    trained = model(input_ids=ids).logits.detach()
    with reference_policy(model):
        assert torch.equal(model(input_ids=ids).logits, base(input_ids=ids).logits)
    assert torch.equal(model(input_ids=ids).logits, trained)
    assert not torch.equal(trained, base(input_ids=ids).logits)


def test_reference_policy_refuses_an_unfinished_graph():
    model = restrict(tiny_model(), make_mask(tiny_model()))
    loss = loss_of(model, 0)
    with pytest.raises(TrainingError, match="unfinished graph"), reference_policy(model):
        pass
    loss.backward()
    with reference_policy(model):
        pass
    abandoned = loss_of(model, 0)
    del abandoned
    with reference_policy(model):
        pass


def test_reference_policy_under_autocast_leaves_no_copies():
    """One autocast context around both: the reference's 16-bit weights are not the policy's."""
    model = tiny_model("llama", tied=False)
    mask = make_mask(model, 0.5, "layer")
    restrict(model, mask)
    with torch.no_grad():
        for link in links(model):
            link.selected.mul_(3)
    sync(model)
    ids = torch.arange(10)[None] + 3
    results = []
    for with_reference in (False, True):
        model.zero_grad()
        with torch.autocast("cpu", torch.bfloat16):
            if with_reference:
                with reference_policy(model):
                    reference = model(input_ids=ids).logits
            logits = model(input_ids=ids).logits
        logits.float().square().sum().backward()
        results.append((logits, [p.grad.clone() for p in trainable(model)]))
    assert torch.equal(results[0][0], results[1][0])
    assert not torch.equal(results[1][0], reference)
    for alone, after in zip(results[0][1], results[1][1], strict=True):
        assert torch.equal(alone, after)


def test_a_weight_that_others_read_has_its_gradient():
    """F.linear on a module's weight, and nn.MultiheadAttention, which does that."""
    linear, dense = nn.Linear(8, 8), nn.Linear(8, 8)
    dense.load_state_dict(linear.state_dict())
    mask, x = make_mask(linear, 0.3), torch.randn(3, 8)
    for module in (dense, restrict(linear, mask)):
        nn.functional.linear(x, module.weight).square().sum().backward()
    assert torch.equal(linear.selected.grad, dense.weight.grad[mask.dense("weight")])

    attention = nn.MultiheadAttention(8, 2, batch_first=True)
    twin = copy.deepcopy(attention)
    mask, x = make_mask(attention, 0.3), torch.randn(2, 3, 8)
    for module in (twin, restrict(attention, mask)):
        module(x, x, x)[0].square().sum().backward()
    expected = dict(twin.named_parameters())
    for link in links(attention):
        name = link.state.name
        torch.testing.assert_close(link.selected.grad, expected[name].grad[mask.dense(name)])


def test_reference_policy_restores_after_an_error():
    model = restrict(tiny_model(), make_mask(tiny_model()))
    compact_steps(model, 1, MaskedAdamW(trainable(model), lr=1e-2))
    before = {n: p.detach().clone() for n, p in model.named_parameters()}
    with pytest.raises(RuntimeError, match="inside"), reference_policy(model):
        raise RuntimeError("inside")
    assert all(torch.equal(p, before[n]) for n, p in model.named_parameters())


def test_reference_policy_needs_base_values():
    with pytest.raises(TrainingError, match="keep_base"), reference_policy(tiny_model()):
        pass
    model = restrict(tiny_model(), make_mask(tiny_model()), keep_base=False)
    with pytest.raises(TrainingError, match="keep_base"), reference_policy(model):
        pass


def test_errors():
    model = tiny_model()
    with pytest.raises(MaskError):
        restrict(model, make_mask(tiny_model("gpt2")))
    restrict(model, make_mask(model))
    with pytest.raises(ModelError, match="already"):
        restrict(model, make_mask(tiny_model()))
    with pytest.raises(MaskError, match="nothing"):
        restrict(tiny_model(), ~ParameterMask.full(named_shapes(tiny_model())))


@pytest.mark.parametrize("granularity", ["element", "row"])
def test_a_weight_that_is_not_contiguous_is_refused(granularity):
    model = nn.Sequential(nn.Linear(4, 8))
    model[0].weight = nn.Parameter(torch.randn(4, 8).t())
    with pytest.raises(ModelError, match=r"0\.weight is not contiguous"):
        restrict(model, make_mask(model, 0.5, granularity))


def test_sync_after_averaging():
    model = restrict(tiny_model(), make_mask(tiny_model()))
    with torch.no_grad():
        for parameter in trainable(model):
            parameter.add_(0.5)
    sync(model)
    for link in links(model):
        assert torch.allclose(
            link.weight.flatten()[link.state.entries.positions.long()]
            if link.state.entries.positions is not None
            else link.weight.flatten(),
            link.selected,
        )


# Steps of a compiled llama are compared by tests/modules/test_restricted_training.py.
@pytest.mark.parametrize("kind", [pytest.param("llama", marks=pytest.mark.long), "gpt2", "mixtral"])
def test_compile_gives_equal_gradients(kind):
    grads = []
    for compiled in (False, True):
        model = restrict(tiny_model(kind), make_mask(tiny_model(kind)))
        ids = torch.arange(20).view(2, 10) + 5
        forward = (
            torch.compile(model.get_decoder(), backend="aot_eager")
            if compiled
            else model.get_decoder()
        )
        hidden = forward(input_ids=ids, use_cache=False).last_hidden_state
        hidden.square().mean().backward()
        grads.append(
            [torch.zeros(1) if p.grad is None else p.grad.clone() for p in trainable(model)]
        )
    for a, b in zip(*grads, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-6)


def test_columns_of_an_embedding_train():
    model = tiny_model("llama", tied=False)
    scores = {n: torch.zeros(p.shape) for n, p in model.named_parameters()}
    scores["model.embed_tokens.weight"][:, [3, 7]] = 1.0
    mask = select(scores, 1 / 32, "per_parameter", granularity="row",
                  row_axes={"model.embed_tokens.weight": 1})  # fmt: skip
    keep = {n: torch.zeros(p.shape, dtype=torch.bool) for n, p in model.named_parameters()}
    keep["model.embed_tokens.weight"] = mask.dense("model.embed_tokens.weight")
    assert mask.selections["model.embed_tokens.weight"].axis == 1
    dense = tiny_model("llama", tied=False)
    loss_of(dense, 0).backward()
    restrict(model, mask)
    loss_of(model, 0).backward()
    module = model.model.embed_tokens
    got = torch.zeros(32, 384)
    got[module._compact_parameters["weight"].entries.rows] = module.selected.grad.view(-1, 384)
    expected = dense.model.embed_tokens.weight.grad.t() * keep["model.embed_tokens.weight"].t()
    torch.testing.assert_close(got, expected)
