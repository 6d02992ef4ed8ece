from tests.kernels.interpreted import test_weighted_preference_loss
from tests.kernels.interpreted.test_weighted_preference_loss import *  # noqa: F403

BODIES = test_weighted_preference_loss

del test_ignored_tokens_are_zero_and_unread  # noqa: F821 (reads are counted in the interpreter)
del test_traffic_is_two_reads_of_each_row_and_one_write  # noqa: F821
