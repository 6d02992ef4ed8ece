"""What holds on a CPU of runs that are restricted to a mask, on a GPU."""

from tests.modules.test_restricted_training import *  # noqa: F403

del test_16_bit_weights_train_without_masters  # noqa: F821 (its parameters hold CPU masks)
