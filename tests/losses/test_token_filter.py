import pytest
import torch

from lit_align.losses import TokenFilter, dpo_loss, sequence_logps

ONE = torch.zeros(4, dtype=torch.int64)
CHOSEN, REJECTED = torch.tensor([False]), torch.tensor([True])


def test_by_hand():
    rewards = torch.tensor([0.1, 0.9, 0.5, 0.2])
    for settings, expected in (
        ({"drop_fraction": 0.25}, [1, 0, 1, 1]),
        ({"drop_fraction": 0.5}, [1, 0, 0, 1]),
        ({"keep_fraction": 0.25}, [1, 0, 0, 0]),
        ({"keep_fraction": 0.5}, [1, 0, 0, 1]),
    ):
        assert TokenFilter(**settings).weights(rewards, ONE, CHOSEN).tolist() == expected


def test_the_two_settings_are_different_things():
    """10 % dropped (the paper) keeps 18 of 20 tokens; 10 % kept (the public code) keeps 2."""
    rewards, index = torch.randn(20), torch.zeros(20, dtype=torch.int64)
    dropped = TokenFilter(drop_fraction=0.1).weights(rewards, index, REJECTED)
    kept = TokenFilter(keep_fraction=0.1).weights(rewards, index, REJECTED)
    assert (dropped.sum(), kept.sum()) == (18, 2)
    assert set(rewards.topk(2).indices.tolist()) == set((dropped == 0).nonzero()[:, 0].tolist())
    assert set((-rewards).topk(2).indices.tolist()) == set(kept.nonzero()[:, 0].tolist())


@pytest.mark.parametrize("epsilon", [0.1, 0.3, 0.7])
def test_keep_fraction_is_the_public_rule_over_valid_tokens(epsilon):
    """−Δ at least the k-th largest −Δ, k = int(ε · length)."""
    rewards, index = torch.randn(37), torch.zeros(37, dtype=torch.int64)
    threshold = (-rewards).topk(int(epsilon * 37)).values[-1]
    found = TokenFilter(keep_fraction=epsilon).weights(rewards, index, REJECTED)
    assert torch.equal(found, (-rewards >= threshold).float())


@pytest.mark.parametrize("fraction", [0.01, 0.1, 0.5, 0.99])
@pytest.mark.parametrize("setting", ["drop_fraction", "keep_fraction"])
def test_at_step_0_every_token_is_kept(setting, fraction):
    found = TokenFilter(**{setting: fraction}).weights(torch.zeros(4), ONE, REJECTED)
    assert found.tolist() == [1, 1, 1, 1]


@pytest.mark.parametrize("tokens", [1, 2, 3, 9])
def test_short_responses_keep_at_least_one_token(tokens):
    """int(0.1 · 9) = 0: the public code raises there."""
    rewards, index = torch.arange(tokens).float(), torch.zeros(tokens, dtype=torch.int64)
    kept = TokenFilter(keep_fraction=0.1).weights(rewards, index, REJECTED)
    assert kept.tolist() == [1] + [0] * (tokens - 1)
    dropped = TokenFilter(drop_fraction=0.1).weights(rewards, index, REJECTED)
    assert dropped.tolist() == [1] * tokens
    nearly_all = TokenFilter(drop_fraction=0.999).weights(rewards, index, REJECTED)
    assert nearly_all[0] == 1


def test_each_response_has_a_threshold_of_its_own():
    lengths = [4, 10, 1, 7]
    index = torch.repeat_interleave(torch.arange(4), torch.tensor(lengths))
    rewards = torch.randn(22) + 100.0 * index
    found = TokenFilter(drop_fraction=0.5).weights(rewards, index, torch.zeros(4).bool())
    assert sequence_logps(found, index, 4).tolist() == [2, 5, 1, 4]
    for s in range(4):
        alone = rewards[index == s]
        one = torch.zeros(lengths[s], dtype=torch.int64)
        expected = TokenFilter(drop_fraction=0.5).weights(alone, one, CHOSEN)
        assert torch.equal(found[index == s], expected)


@pytest.mark.parametrize(
    ("side", "expected"),
    [
        ("chosen", [1, 0, 1, 1, 1, 0]),
        ("rejected", [1, 1, 1, 0, 1, 1]),
        ("both", [1, 0, 1, 0, 1, 0]),
    ],
)
def test_sides(side, expected):
    rewards, index = torch.tensor([1.0, 2.0] * 3), torch.tensor([0, 0, 1, 1, 2, 2])
    is_rejected = torch.tensor([False, True, False])
    found = TokenFilter(side, drop_fraction=0.5).weights(rewards, index, is_rejected)
    assert found.tolist() == expected


def test_a_response_without_targets_changes_nothing():
    rewards, index = torch.tensor([1.0, 2.0]), torch.tensor([0, 0])
    found = TokenFilter(drop_fraction=0.5).weights(rewards, index, torch.tensor([False, True]))
    assert found.tolist() == [1, 0]
    empty = torch.empty(0)
    assert TokenFilter(drop_fraction=0.5).weights(empty, empty.long(), CHOSEN).shape == (0,)


def test_the_filtered_loss_and_its_gradient():
    """−logσ(β(Σ q_c·Δ_c − Σ q_r·Δ_r)); a token left out gets no gradient, q carries none."""
    index, beta = torch.tensor([0, 0, 1, 1, 1]), 0.5
    policy = torch.tensor([-1.0, -2.0, -1.0, -3.0, -0.5], requires_grad=True)
    ref = torch.tensor([-2.0, -1.0, -2.0, -1.0, -2.0])  # Δ = (1, −1, 1, −2, 1.5)
    weights = TokenFilter(drop_fraction=0.5).weights(policy - ref, index, torch.tensor([0, 1]) == 1)
    assert weights.tolist() == [0, 1, 1, 1, 0]
    chosen, rejected = sequence_logps(policy, index, 2, weights)
    ref_chosen, ref_rejected = sequence_logps(ref, index, 2, weights)
    loss, _, _ = dpo_loss(chosen[None], rejected[None], ref_chosen[None], ref_rejected[None], beta)
    torch.testing.assert_close(loss, torch.log1p(torch.exp(torch.tensor([0.0]))))  # h = −1 − (−1)
    loss.sum().backward()
    assert policy.grad.tolist() == [0, -0.25, 0.25, 0.25, 0]
    assert not weights.requires_grad


@pytest.mark.parametrize(
    "settings",
    [
        {},
        {"drop_fraction": 0.1, "keep_fraction": 0.1},
        {"drop_fraction": 0.0},
        {"drop_fraction": 1.0},
        {"keep_fraction": -0.1},
        {"keep_fraction": float("nan")},
        {"side": "left", "keep_fraction": 0.1},
    ],
)
def test_bad_settings_are_an_error(settings):
    with pytest.raises(ValueError, match=r"drop_fraction and keep_fraction|choose chosen"):
        TokenFilter(**settings)


def test_tokens_that_do_not_take_part_neither_count_nor_drop():
    rewards = torch.tensor([9.0, 0.1, 0.9, 0.5, 0.2])
    valid = torch.tensor([False, True, True, True, True])
    token_filter = TokenFilter("both", drop_fraction=0.25)
    kept = token_filter.weights(
        rewards, torch.zeros(5, dtype=torch.int64), torch.tensor([False]), valid
    )
    assert kept.tolist() == [1.0, 1.0, 0.0, 1.0, 1.0]
