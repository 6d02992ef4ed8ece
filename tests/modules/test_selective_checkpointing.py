"""Selective checkpointing: the same gradients, products made once, less kept than without."""

import pytest
import torch
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._python_dispatch import TorchDispatchMode

from lit_align.compact import use_fast_products
from lit_align.errors import TrainingError
from lit_align.modules import MaskedDPO
from lit_align.modules.activation_checkpointing import PRODUCTS, checkpoint_activations
from lit_align.modules.shared_prefix import enable_shared_prefix
from tests.modules.test_activation_memory import TOP, WAYS, a_batch, deep_model, loss_of


class Watch(TorchDispatchMode):
    """Counts products, and knows which storages live."""

    def __init__(self):
        super().__init__()
        self.products, self.storages = 0, {}

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        found = func(*args, **(kwargs or {}))
        self.products += func._schema.name in PRODUCTS
        for tensor in found if isinstance(found, tuple) else (found,):
            if isinstance(tensor, torch.Tensor):
                storage = tensor.untyped_storage()
                self.storages[storage.data_ptr()] = StorageWeakRef(storage), storage.nbytes()
        return found

    def living_bytes(self):
        return sum(size for reference, size in self.storages.values() if not reference.expired())


def run(way, how, kind="llama", fast=False):
    """Gradients of what trains; bytes that live after the forward; products of both passes."""
    model = deep_model(kind, 4)
    if fast:
        use_fast_products(model)
    enable_shared_prefix(model)  # runs the model, to compare the layouts
    WAYS[way](model, TOP)
    checkpoint_activations(model.train(), how)
    batch = a_batch()
    with Watch() as watch:
        loss = loss_of(model, batch)
        kept, before = watch.living_bytes(), watch.products
        loss.backward()
    gradients = {n: p.grad for n, p in model.named_parameters() if p.grad is not None}
    return gradients, kept, (before, watch.products - before)


@pytest.mark.parametrize("fast", [False, True], ids=["plain", "fast products"])
@pytest.mark.parametrize(
    ("way", "kind"),
    [("elements", "llama"), ("rows", "gpt2"), ("layers", "llama"), ("adapters", "llama"),
     ("gates", "llama")],
)  # fmt: skip
def test_gradients_are_the_same_and_products_are_not_repeated(way, kind, fast, monkeypatch):
    monkeypatch.setattr("lit_align.compact.fast_products.has_faster_products", lambda: True)
    plain, kept, products = run(way, False, kind, fast)
    selective, kept_selective, products_selective = run(way, "selective", kind, fast)
    assert plain.keys() == selective.keys() and plain
    for name, gradient in plain.items():
        assert torch.equal(selective[name], gradient), name
    assert products_selective == products
    _, kept_layers, products_layers = run(way, True, kind, fast)
    assert kept_layers < kept_selective and products_layers[1] > products[1]
    if way in ("elements", "rows", "layers"):  # the others keep little of what goes into products
        assert kept - kept_selective > 0.3 * (kept - kept_layers)


def test_other_words_are_refused():
    with pytest.raises(TrainingError, match="'some': choose one of False, True, selective"):
        MaskedDPO("m", gradient_checkpointing="some")
