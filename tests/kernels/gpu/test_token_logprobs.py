from tests.kernels.interpreted import test_token_logprobs
from tests.kernels.interpreted.test_token_logprobs import *  # noqa: F403

BODIES = test_token_logprobs

del test_every_logit_moves_once  # noqa: F821 (counted in the interpreter alone)
del test_rows_beyond_2_to_the_31_elements  # noqa: F821 (a sparse file there; see test_large.py)
