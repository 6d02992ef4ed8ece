"""Rows of logits in Triton's interpreter: values and gradients by error budget, and traffic."""

import pytest
import torch

from lit_align_kernels.audit.interpreter import interpreted
from lit_align_kernels.audit.traffic import traffic
from lit_align_kernels.token_logprobs import WeightHandle, audit, token_logprobs
from lit_align_kernels.token_logprobs.kernel import padded_logits, rows_backward_, rows_forward
from tests.kernels.cases import entries_of, flat_order

DTYPES = (torch.float32, torch.bfloat16, torch.float16)
EPS = {torch.float32: 2e-6, torch.bfloat16: 1e-3, torch.float16: 1e-4}


def raw_logits(rows, vocabulary, dtype, spread=3.0, layout="padded"):
    """Products of a head in a layout of memory; what lies between the rows is NaN."""
    generator = torch.Generator().manual_seed(vocabulary)
    values = spread * torch.randn(rows, vocabulary, generator=generator)
    if layout == "padded":
        logits = padded_logits(rows, vocabulary, dtype, torch.device("cpu"))
    elif layout == "contiguous":
        logits = torch.empty(rows, vocabulary, dtype=dtype)
    else:  # nothing is aligned: odd first element, odd stride
        logits = torch.empty(rows * (vocabulary + 8) + 3, dtype=dtype)[3:]
        logits = logits.as_strided((rows, vocabulary), (vocabulary + 5, 1), 3)
    return logits.copy_(values)


def torch_rows(raw, targets, grad, scale, cap, dtype):
    """Log-probs, logsumexp and gradient of the raw products by torch's autograd in `dtype`."""
    x = raw.to(dtype, copy=True).requires_grad_()
    z = x * scale
    z = z if cap is None else cap * torch.tanh(z / cap)
    inside = (targets >= 0) & (targets < raw.shape[1])
    picked = z.log_softmax(1).gather(1, targets.where(inside, 0)[:, None])[:, 0]
    # A stray target has no one-hot: only its row's logsumexp gives a gradient.
    picked = picked.where(inside, -z.logsumexp(1))
    (picked * grad.to(dtype)).sum().backward()
    logps = picked.detach().where(inside, torch.nan)
    return logps, z.logsumexp(1).detach(), x.grad


def run_rows(logits, targets, grad, scale=1.0, cap=None):
    with interpreted(), traffic():  # which raises where something stray is touched
        logps, logsumexp = rows_forward(logits, targets, scale, cap)
        rows_backward_(logits, targets, logsumexp, grad, scale, cap)
    return logps, logsumexp, logits


def assert_within_budget(got, exact, same_dtype, eps):
    """Error at most twice that of torch in the same precision, and eps of the largest value."""
    got, same_dtype = got.double(), same_dtype.double()
    assert torch.equal(got.isnan(), exact.isnan())
    finite = exact.isfinite()
    assert torch.equal(got[~finite].nan_to_num(), exact[~finite].nan_to_num())
    budget = 2 * (same_dtype - exact)[finite].abs() + eps * exact[finite].abs().max()
    error = (got - exact)[finite].abs()
    assert (error <= budget).all(), (error - budget).max().item()


def check_rows(logits, targets, grad, scale=1.0, cap=None):
    raw, dtype = logits.clone(), logits.dtype
    exact = torch_rows(raw, targets, grad, scale, cap, torch.float64)
    single = torch_rows(raw.float(), targets, grad, scale, cap, torch.float32)
    logps, logsumexp, d_logits = run_rows(logits, targets, grad, scale, cap)
    assert logps.dtype == logsumexp.dtype == torch.float32
    assert_within_budget(logps, exact[0], single[0], 1e-6)
    assert_within_budget(logsumexp, exact[1], single[1], 1e-6)
    assert_within_budget(d_logits, exact[2], single[2].to(dtype), EPS[dtype])


def some_targets(rows, vocabulary):
    """First, last, and others."""
    targets = torch.arange(rows) * 7919 % vocabulary
    targets[0], targets[-1] = 0, vocabulary - 1
    return targets


@pytest.mark.parametrize("layout", ["padded", "contiguous", "misaligned"])
@pytest.mark.parametrize("vocabulary", [507, 512, 1000, 2053])
@pytest.mark.parametrize("dtype", DTYPES)
def test_values_and_gradients(dtype, vocabulary, layout):
    logits = raw_logits(5, vocabulary, dtype, layout=layout)
    check_rows(logits, some_targets(5, vocabulary), torch.tensor([1.0, -0.5, 2.0, 1e-3, 0.7]))


@pytest.mark.parametrize("dtype", DTYPES)
def test_a_long_row_takes_a_wide_program(dtype):
    logits = raw_logits(2, 50257, dtype)
    check_rows(logits, torch.tensor([50256, 8192]), torch.tensor([1.0, -2.0]))


@pytest.mark.parametrize(
    ("scale", "cap"), [(0.25, None), (-1.5, None), (1.0, 30.0), (2.0, 5.0), (0.5, 0.1)]
)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_scale_and_soft_cap(dtype, scale, cap):
    logits = raw_logits(4, 1000, dtype)
    check_rows(logits, some_targets(4, 1000), torch.tensor([1.0, -0.5, 2.0, 0.7]), scale, cap)


@pytest.mark.parametrize("columns", [1, 15, 16, 17, 31, 40])
def test_rows_shorter_than_a_group(columns):
    logits = raw_logits(6, columns, torch.float32, layout="misaligned")
    check_rows(logits, torch.arange(6) % columns, torch.ones(6))


def test_extreme_logits():
    logits = raw_logits(4, 507, torch.float32)
    logits[0, 3], logits[0, 4] = 1e4, -1e4
    logits[1] = -1e4
    logits[2] += 1e4
    logits[3, ::2] = -torch.inf
    targets = torch.tensor([4, 0, 17, 2])
    exact = torch_rows(logits.clone(), targets, torch.ones(4), 1.0, None, torch.float64)
    logps, logsumexp, d_logits = run_rows(logits, targets, torch.ones(4))
    assert logps[3] == -torch.inf
    torch.testing.assert_close(logps.double(), exact[0], rtol=1e-6, atol=2e-6)
    torch.testing.assert_close(logsumexp.double(), exact[1], rtol=1e-6, atol=2e-6)
    # exp(z - logsumexp) where logsumexp = 1e4 is known to 5e-4.
    torch.testing.assert_close(d_logits[:3].double(), exact[2][:3], rtol=1e-3, atol=1e-6)


def test_infinite_rows_are_what_torch_makes_of_them():
    logits = raw_logits(3, 507, torch.float32)
    logits[0] = -torch.inf
    logits[1, 5] = torch.nan
    logits[2, 6] = torch.inf
    with interpreted():
        logps, logsumexp = rows_forward(logits, torch.tensor([1, 2, 3]), 1.0, None)
    assert logps.isnan().all()
    assert logsumexp[0] == -torch.inf
    assert logsumexp[1:].isnan().all()


@pytest.mark.parametrize("cap", [None, 30.0])
def test_a_soft_cap_bounds_infinities(cap):
    """Torch gives +-cap for them, and so do we; a slope of 0."""
    logits = raw_logits(1, 507, torch.float32)
    logits[0, :7] = -torch.inf
    check_rows(logits, torch.tensor([100]), torch.ones(1), 1.0, cap)


def test_targets_outside_the_vocabulary_are_nan_and_read_nothing():
    logits = raw_logits(4, 507, torch.bfloat16)
    targets = torch.tensor([507, -100, 1 << 40, 2])
    check_rows(logits, targets, torch.tensor([1.0, 2.0, 3.0, 4.0]))


def test_a_factor_of_zero_gives_exactly_zero():
    logits = raw_logits(4, 507, torch.float32)
    logits[0] = torch.nan
    logits[1] = torch.inf
    logits[2] = -torch.inf
    _, _, d_logits = run_rows(logits, torch.tensor([0, 1, 2, 3]), torch.zeros(4))
    assert (d_logits == 0).all()


@pytest.mark.parametrize("dtype", DTYPES)
def test_padding_is_not_touched(dtype):
    logits = raw_logits(3, 507, dtype)
    storage = torch.as_strided(logits, (3, logits.stride(0)), (logits.stride(0), 1))
    assert storage[:, 507:].isnan().all() and logits.stride(0) * dtype.itemsize % 128 == 0
    _, _, d_logits = run_rows(logits, torch.tensor([0, 1, 2]), torch.ones(3))
    assert storage[:, 507:].isnan().all()
    assert d_logits.isfinite().all()


def test_values_of_rows_may_lie_apart():
    logits = raw_logits(4, 507, torch.float32)
    targets, grad = torch.arange(8)[::2], torch.arange(1.0, 9.0)[::2]
    check_rows(logits, targets, grad)


def test_rows_beyond_2_to_the_31_elements(tmp_path):
    """In a sparse file, of which only the touched pages exist."""
    stride = (1 << 30) + 16
    storage = torch.from_file(
        str(tmp_path / "logits"), shared=True, size=2 * stride + 512, dtype=torch.bfloat16
    )
    logits = storage.as_strided((3, 507), (stride, 1))
    logits.copy_(raw_logits(3, 507, torch.bfloat16))
    check_rows(logits, torch.tensor([0, 1, 506]), torch.tensor([1.0, 2.0, 3.0]))


def test_no_rows():
    logps, logsumexp, _ = run_rows(
        raw_logits(0, 507, torch.float32), torch.empty(0, dtype=torch.int64), torch.empty(0)
    )
    assert logps.shape == logsumexp.shape == (0,)


def test_rows_must_be_rows():
    logits = raw_logits(4, 507, torch.float32)
    with pytest.raises(ValueError, match="are no rows"):
        rows_forward(logits.t(), torch.zeros(507, dtype=torch.int64), 1.0, None)
    with pytest.raises(ValueError, match="targets"):
        rows_forward(logits, torch.zeros(3, dtype=torch.int64), 1.0, None)


@pytest.mark.parametrize("kind", ["rows", "elements", None])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_public_function_in_chunks_of_tokens(monkeypatch, dtype, kind):
    """Log-probs and all gradients, chunked and at once, against fp64."""
    generator = torch.Generator().manual_seed(0)
    n, vocabulary, width = 21, 507, 48
    hidden = torch.randn(n, width, generator=generator).to(dtype)
    weight = (0.3 * torch.randn(vocabulary, width, generator=generator)).to(dtype)
    bias = torch.randn(vocabulary, generator=generator).to(dtype)
    targets = torch.randint(vocabulary, (n,), generator=generator)
    grad = torch.randn(n, generator=generator)
    entries = None if kind is None else entries_of(kind, (vocabulary, width))
    exact = _gradients_in_fp64(hidden, weight, bias, targets, grad)

    monkeypatch.setenv("LIT_ALIGN_KERNELS", "triton")
    inputs = [t.clone().requires_grad_() for t in (hidden, bias)]
    selected = None if entries is None else torch.zeros(entries.numel, requires_grad=True)
    trained = weight.clone().requires_grad_(entries is None)
    handle = WeightHandle(trained, selected, entries, inputs[1])
    with interpreted(), traffic() as seen:
        logps = token_logprobs(
            inputs[0], handle, targets, logit_scale=0.5, soft_cap=8.0, max_logits_bytes=5 << 10
        )
        logps.backward(grad)
    launched = [launch.kernel for launch in seen.launches]
    assert launched.count("forward_kernel") == launched.count("backward_kernel") > 1
    d_weight = exact[2] if entries is None else exact[2].reshape(-1)[flat_order(entries)]
    found = trained.grad if entries is None else selected.grad
    # Logits in the hidden states' dtype: each is known to half a unit in its last place.
    tolerance = 1e-5 if dtype == torch.float32 else 2e-2
    for got, want in (
        (logps, exact[0]),
        (inputs[0].grad, exact[1]),
        (found, d_weight),
        (inputs[1].grad, exact[3]),
    ):
        assert (got.double() - want).abs().max() <= tolerance * want.abs().max()


def _gradients_in_fp64(hidden, weight, bias, targets, grad):
    h, w, b = (t.double().requires_grad_() for t in (hidden, weight, bias))
    z = 8.0 * torch.tanh((h @ w.t() + b) * 0.5 / 8.0)
    logps = z.log_softmax(1).gather(1, targets[:, None])[:, 0]
    logps.backward(grad.double())
    return logps.detach(), h.grad, w.grad, b.grad


@pytest.mark.parametrize("case", audit.traffic_cases(), ids=lambda case: case.name)
def test_every_logit_moves_once(case):
    with interpreted(), traffic(tensors=case.tensors) as seen:
        case.call()
    assert seen.out_of_bounds == 0 and seen.races == 0
    targets_again = 3 * 4  # at most: the forward reads the logit of each row's target apart
    assert case.minimum_bytes <= seen.moved <= case.minimum_bytes + targets_again
