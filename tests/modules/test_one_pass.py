"""The loss in one pass over the head is the objective on log-probs, gradients included."""

import types

import pytest
import torch

import lit_align_kernels.token_logprobs.chunks as chunks
from lit_align.batch import CHOSEN, REJECTED, PackedBatch
from lit_align.callbacks import KeyParameterLocalization
from lit_align.compact import trainable
from lit_align.modules import MaskedDPO, SupervisedFineTuning, TokenWeightedNPO
from lit_align.modules.forward import per_token_logps
from lit_align_kernels.weighted_preference_loss import TokenNPO
from tests.tiny_models import tiny_model
from tests.training_runs import preferences, random_mask, trainer

VOCABULARY = 384
TARGETS = (3, 5, 0, 4, 6, 2, 4, 4)  # of four pairs; one response is empty, the last pair a filler
MODULES = {
    "sft": lambda: SupervisedFineTuning("m"),
    "dpo": lambda: MaskedDPO("m", beta=0.5),
    "ipo": lambda: MaskedDPO("m", beta=0.5, loss_type="ipo"),
    "filter": lambda: MaskedDPO("m", beta=0.5, filter_drop_fraction=0.3),
    "npo": lambda: TokenWeightedNPO("m", beta=0.5),
    "sequence npo": lambda: TokenWeightedNPO("m", beta=0.5, loss_type="sequence"),
    "npo, nll": lambda: TokenWeightedNPO("m", beta=0.5, retain="nll", retain_weight=2.0),
    "sequence npo, nll": lambda: TokenWeightedNPO(
        "m", beta=0.5, loss_type="sequence", retain="nll"
    ),
}


def batch_of_pairs() -> PackedBatch:
    g = torch.Generator().manual_seed(2)
    length, sequences = 8, len(TARGETS)
    ids = torch.randint(3, VOCABULARY, (sequences, length), generator=g)
    index = torch.repeat_interleave(torch.arange(sequences), torch.tensor(TARGETS))
    positions = torch.cat([torch.arange(1, 1 + n) for n in TARGETS])
    filler = index >= sequences - 2
    return PackedBatch(
        input_ids=ids,
        position_ids=torch.arange(length).repeat(sequences, 1),
        attention_mask=torch.ones_like(ids),
        hidden_index=index * length + positions - 1,
        target_ids=ids[index, positions],
        sequence_index=index,
        token_weights=(torch.rand(len(index), generator=g) + 0.1).where(~filler, 0.0),
        sequence_roles=torch.tensor([CHOSEN, REJECTED] * (sequences // 2)),
        row_ids=torch.tensor([0, 0, 1, 1, 2, 2, -1, -1]),
        ref_per_token_logps=-torch.rand(len(index), generator=g) - 5.5,
    )


def module_of(kind):
    module = MODULES[kind]()
    module.language_model = tiny_model("llama").train()
    module._trainer = types.SimpleNamespace(precision="32-true")
    return module


def loss_and_gradients(module, objective):
    module.zero_grad()
    objective.loss_sum.backward()
    return objective.loss_sum.detach(), {n: p.grad.clone() for n, p in module.named_parameters()}


@pytest.mark.parametrize("tokens", [1, 12, 1000])
@pytest.mark.parametrize("referenced", [True, False])
@pytest.mark.parametrize("kind", MODULES)
def test_one_pass_equals_two(kind, referenced, tokens, monkeypatch):
    """`referenced` as in training; without, as in gradient localisation."""
    monkeypatch.setattr(chunks, "CPU_LOGITS_BYTES", tokens * 4 * VOCABULARY)
    module, batch = module_of(kind), batch_of_pairs()
    reference = batch.ref_per_token_logps if referenced else None
    one = module._objective(batch, reference)
    one_loss, one_grads = loss_and_gradients(module, one)

    logps = per_token_logps(module.model, batch)
    reference = logps.detach() if reference is None else reference
    two = module.objective(batch, logps, reference)
    two_loss, two_grads = loss_and_gradients(module, two)

    torch.testing.assert_close(one_loss, two_loss)
    assert torch.equal(one.units, two.units)
    assert one.reported.keys() == two.reported.keys()
    for name, values in one.reported.items():
        torch.testing.assert_close(values, two.reported[name], msg=name)
    for name, grad in one_grads.items():
        torch.testing.assert_close(grad, two_grads[name], rtol=1e-4, atol=1e-6, msg=name)


def test_token_npo_is_the_fused_kernels_loss():
    batch = batch_of_pairs()
    assert isinstance(module_of("npo").chunk_loss(batch, batch.ref_per_token_logps), TokenNPO)
    assert not isinstance(module_of("npo").chunk_loss(batch, None), TokenNPO)
    for other in ("sequence npo", "npo, nll"):
        loss = module_of(other).chunk_loss(batch, batch.ref_per_token_logps)
        assert not isinstance(loss, TokenNPO)


def test_divergence_from_the_reference_needs_hidden_states_of_its_own():
    assert TokenWeightedNPO("m", retain="kl", reference="swap").sequences_together is None


def test_sequences_of_targets():
    batch = batch_of_pairs()
    assert batch.target_offsets == [0, 3, 8, 8, 12, 18, 20, 24, 28]
    part = batch.sequences_of_targets(3, 18)
    assert part.sequence_index.tolist() == [0] * 5 + [2] * 4 + [3] * 6
    assert part.target_offsets == [0, 5, 5, 9, 15]
    assert torch.equal(part.target_ids, batch.target_ids[3:18])
    assert torch.equal(part.sequence_roles, batch.sequence_roles[1:5])
    parts = [batch.sequences_of_targets(a, b) for a, b in ((0, 8), (8, 12), (12, 28))]
    assert [p.num_sequences for p in parts] == [3, 1, 4]  # the empty one is in the first
    pairs = [batch.sequences_of_targets(a, b, together=2) for a, b in ((0, 8), (8, 12), (12, 28))]
    assert [p.num_sequences for p in pairs] == [2, 2, 4]


@pytest.mark.parametrize("precision", ["32-true", "bf16-true"])
def test_training_takes_one_pass_where_nothing_is_logged(
    precision, tiny_llama_dir, tmp_path, monkeypatch
):
    random_mask().save(tmp_path / "mask")
    calls = []
    objective = MaskedDPO._objective
    monkeypatch.setattr(
        MaskedDPO, "_objective", lambda *a: calls.append(1) or objective(*a), raising=True
    )

    def trained(log_every_n_steps):
        module = MaskedDPO(str(tiny_llama_dir), beta=0.5, learning_rate=5e-3, eps=1e-6)
        callbacks = [KeyParameterLocalization(mask=str(tmp_path / "mask"))]
        trainer(
            tmp_path, log_every_n_steps=log_every_n_steps, callbacks=callbacks, max_epochs=1,
            accumulate_grad_batches=2, precision=precision,
        ).fit(module, preferences(16, group_by_length=True))  # fmt: skip
        return torch.cat([p.detach().flatten() for _, p in trainable(module.model)])

    logged = trained(1)
    assert not calls
    silent = trained(1000)
    assert calls
    tolerance = (
        {"rtol": 1e-3, "atol": 1e-5} if precision == "32-true" else {"rtol": 0.05, "atol": 5e-3}
    )
    torch.testing.assert_close(silent, logged, **tolerance)
