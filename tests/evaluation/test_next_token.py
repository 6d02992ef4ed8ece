import torch

from lit_align.evaluation.next_token import draw, uniform_numbers


def test_inversion_by_hand():
    # probabilities 0.5, 0.3, 0.2: a uniform in [0, .5) draws 0, in [.5, .8) 1, else 2.
    logits = torch.tensor([0.5, 0.3, 0.2]).log().expand(5, 3)
    uniform = torch.tensor([0.0, 0.49, 0.51, 0.79, 0.81])
    assert draw(logits, 1.0, 1.0, uniform).tolist() == [0, 0, 1, 1, 2]


def test_nucleus_by_hand_whatever_the_order_of_tokens():
    # top_p 0.7 keeps 0.5 and 0.3 (together 0.8), drawn in the ratio 5 : 3.
    logits = torch.tensor([0.2, 0.5, 0.3]).log().expand(4, 3)
    uniform = torch.tensor([0.0, 0.62, 0.63, 0.9999999])
    assert draw(logits, 1.0, 0.7, uniform).tolist() == [1, 1, 2, 2]
    assert draw(logits, 1.0, 0.5, uniform).tolist() == [1, 1, 1, 1]


def test_nucleus_wider_than_its_first_window():
    logits = torch.zeros(1, 5000)  # the nucleus of 0.9 has 4500 tokens
    drawn = {int(draw(logits, 1.0, 0.9, torch.tensor([u / 100]))) for u in range(100)}
    assert len(drawn) == 100


def test_tokens_without_probability_are_never_drawn():
    logits = torch.full((2, 4), -torch.inf)
    logits[:, 1], logits[:, 2] = 0.0, 0.0
    assert draw(logits, 1.0, 1.0, torch.tensor([0.0, 1 - 2**-24])).tolist() == [1, 2]


def test_temperature_sharpens_and_zero_is_the_likeliest():
    logits = torch.tensor([[1.0, 2.0]])
    assert draw(logits, 0.0, 1.0, torch.zeros(1)).tolist() == [1]
    # At T = 0.1 the first token has exp(-10) = 4.5e-5.
    assert draw(logits, 0.1, 1.0, torch.tensor([1e-4])).tolist() == [1]
    assert draw(logits, 1.0, 1.0, torch.tensor([1e-4])).tolist() == [0]


def test_frequencies_follow_the_distribution():
    shares = torch.tensor([0.1, 0.2, 0.7])
    uniform = torch.cat([uniform_numbers(0, i, 0, 100) for i in range(100)])
    tokens = draw(shares.log().expand(10_000, 3), 1.0, 1.0, uniform)
    assert torch.allclose(torch.bincount(tokens) / 10_000, shares, atol=0.015)


def test_uniform_numbers_are_fixed_and_extend():
    assert torch.equal(uniform_numbers(1, 2, 3, 5), uniform_numbers(1, 2, 3, 9)[:5])
    assert not torch.equal(uniform_numbers(1, 2, 3, 5), uniform_numbers(1, 23, 0, 5))
