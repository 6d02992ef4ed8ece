from tests.kernels.interpreted import test_swap_selected
from tests.kernels.interpreted.test_swap_selected import *  # noqa: F403

BODIES = test_swap_selected

del test_bytes_moved  # noqa: F821 (counted in the interpreter alone)
