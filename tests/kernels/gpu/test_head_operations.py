from tests.kernels.interpreted import test_head_operations
from tests.kernels.interpreted.test_head_operations import *  # noqa: F403

BODIES = test_head_operations
