"""Whose autograd graphs are unfinished."""

import torch

from lit_align.compact import graphs, reference_policy, restrict
from tests.compact.test_restrict import loss_of, make_mask
from tests.tiny_models import tiny_model


def test_another_models_graph_does_not_count():
    waiting, model = (restrict(tiny_model(), make_mask(tiny_model())) for _ in range(2))
    loss = loss_of(waiting, 0)
    assert graphs.unfinished(waiting) > 0 and graphs.unfinished(model) == 0
    with reference_policy(model):
        pass
    loss.backward()
    assert graphs.unfinished(waiting) == 0


def test_the_second_forward_of_checkpointing_does_not_count():
    model = restrict(tiny_model(), make_mask(tiny_model())).train()
    model.gradient_checkpointing_enable({"use_reentrant": False})
    with torch.enable_grad():
        loss_of(model, 0).backward()
    assert graphs.unfinished(model) == 0
