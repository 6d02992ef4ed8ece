import torch

from lit_align_kernels.masked_weight_grad import kernel
from tests.kernels.gpu.card import launches
from tests.kernels.interpreted import test_masked_weight_grad
from tests.kernels.interpreted.test_masked_weight_grad import *  # noqa: F403

BODIES = test_masked_weight_grad

del test_traffic, test_packing_rows_counts_into_the_traffic  # noqa: F821 (the interpreter counts)


def kernel_grad(a, b, entries, out=None, accumulate=False, tilings=None):
    """Into NaNs where nothing is accumulated."""
    out = torch.full((entries.numel,), torch.nan) if out is None else out
    with launches() as seen:
        kernel.masked_weight_grad(a, b, entries, out, accumulate, tilings)
    return out, sum(launch.programs for launch in seen.launches)


REPLACED = {"kernel_grad": kernel_grad}
