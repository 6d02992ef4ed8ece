import torch
from transformers import DynamicCache

from lit_align.evaluation.kv_cache import ROOM, RoomyLayer, drop_rows, new_cache
from tests.tiny_models import tiny_model


def test_roomy_layer_follows_the_dynamic_cache_beyond_its_room():
    torch.manual_seed(0)
    ours, theirs = new_cache(tiny_model()), DynamicCache(config=tiny_model().config)
    for columns in [5, 1, ROOM + 3, 1, 1, 2 * ROOM]:
        states = torch.randn(3, 2, columns, 8), torch.randn(3, 2, columns, 8)
        for mine, other in zip(ours.update(*states, 0), theirs.update(*states, 0), strict=True):
            assert torch.equal(mine, other)
    assert ours.get_seq_length() == theirs.get_seq_length()


def test_a_step_copies_no_earlier_column():
    layer = RoomyLayer()
    layer.update(torch.randn(2, 2, 5, 8), torch.randn(2, 2, 5, 8))
    place = layer.keys.data_ptr()
    layer.update(torch.randn(2, 2, 1, 8), torch.randn(2, 2, 1, 8))
    assert layer.keys.data_ptr() == place


def test_reorder_repeats_and_drop_keeps_the_unfinished():
    cache = new_cache(tiny_model())
    values = torch.arange(4.0)[:, None, None, None].expand(4, 2, 3, 8)
    for layer in range(2):
        cache.update(values, values, layer)
    cache.reorder_cache(torch.tensor([0, 0, 1, 2, 3, 3]))
    order = drop_rows(cache, torch.tensor([False, True, False, True, False, True]))
    assert sorted(order.tolist()) == [0, 2, 4]
    old = torch.tensor([0.0, 0, 1, 2, 3, 3])
    for layer in cache.layers:
        assert torch.equal(layer.keys[:, 0, 0, 0], old[order])
        assert torch.equal(layer.values[:, 1, 2, 7], old[order])
    longer, _ = cache.update(torch.ones(3, 2, 1, 8), torch.ones(3, 2, 1, 8), 0)
    assert longer.shape == (3, 2, 4, 8)
