from tests.kernels.interpreted import test_masked_adamw
from tests.kernels.interpreted.test_masked_adamw import *  # noqa: F403

BODIES = test_masked_adamw

del test_bytes_moved  # noqa: F821 (counted in the interpreter alone)
