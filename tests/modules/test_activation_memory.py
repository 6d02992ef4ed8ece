"""What a forward keeps for the backward, and what is not differentiated at all."""

from collections import Counter

import lightning
import pytest
import torch
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from transformers import AutoModelForCausalLM

from lit_align.callbacks import KeyParameterLocalization
from lit_align.compact import AdapterSettings, add_adapters, restrict, trainable
from lit_align.compact.change import Change
from lit_align.compact.gates import gate
from lit_align.masks import ParameterMask
from lit_align.masks.linear_layers import linear_layers
from lit_align.modules import MaskedDPO
from lit_align.modules.activation_checkpointing import checkpoint_activations
from lit_align.modules.forward import target_hidden
from lit_align.modules.shared_prefix import enable_shared_prefix
from tests.tiny_models import tiny_model
from tests.training_runs import assert_equal_weights, preferences, trainer, weights

LAYERS = 4
TOP = (2, 3)  # what trains


def deep_model(kind="llama", layers=LAYERS):
    config = tiny_model(kind).config
    config.num_hidden_layers = layers
    if getattr(config, "layer_types", None):
        config.layer_types = config.layer_types[:1] * layers
    torch.manual_seed(0)
    return AutoModelForCausalLM.from_config(config, dtype=torch.float32)


def blocks(model):
    decoder = model.get_decoder()
    return decoder.layers if hasattr(decoder, "layers") else decoder.h


def top_mask(model, granularity, top):
    """A mask within the top layers."""
    wanted = {id(p) for index in top for p in blocks(model)[index].parameters()}
    g = torch.Generator().manual_seed(1)
    dense = {}
    for name, parameter in model.named_parameters():
        shape = parameter.shape
        drawn = torch.rand(shape if granularity == "element" else shape[:1], generator=g) < 0.3
        chosen = drawn if drawn.shape == shape else drawn[:, None].expand(shape)
        chosen = torch.ones(shape, dtype=torch.bool) if granularity == "layer" else chosen
        dense[name] = chosen if id(parameter) in wanted else torch.zeros_like(chosen)
    return ParameterMask.from_dense(dense)


def with_adapters(model, top):
    mask = top_mask(model, "layer", top)
    layers = linear_layers(model)
    kept = {n: s if n in layers else type(s).none(s.shape) for n, s in mask.selections.items()}
    add_adapters(model, AdapterSettings(rank=2, alpha=4, dropout=0.0), ParameterMask(kept))
    with torch.no_grad():
        for _, parameter in trainable(model):
            parameter.add_(0.05)  # B starts at zero, and with it A's gradient


def with_gates(model, top):
    selections = top_mask(model, "layer", top).selections
    names = [name for name in linear_layers(model) if selections[name].kind == "all"]
    changes = {name: torch.full(selections[name].shape, 0.01) for name in names}
    gate(model, Change(changes, {}))


WAYS = {
    "layers": lambda model, top: restrict(model, top_mask(model, "layer", top)),
    "rows": lambda model, top: restrict(model, top_mask(model, "row", top)),
    "elements": lambda model, top: restrict(model, top_mask(model, "element", top)),
    "adapters": with_adapters,
    "gates": with_gates,
}


def a_batch(layout="shared_prefix"):
    data = preferences(2, batch_size=2, layout=layout)
    data.setup("fit")
    (batch,) = data.train_dataloader()
    return batch


def prepared(way, kind="llama", layers=LAYERS, top=TOP, checkpointing=False):
    model = deep_model(kind, layers)
    enable_shared_prefix(model)  # runs the model, to compare the layouts
    WAYS[way](model, top)
    if checkpointing:
        checkpoint_activations(model, True)
    return model.train()


def loss_of(model, batch):
    return target_hidden(model, batch).square().sum()


class Forwards:
    """Which layers a model ran, in order."""

    def __init__(self, model):
        self.order, self.current = [], None
        for index, block in enumerate(blocks(model)):
            block.register_forward_pre_hook(lambda *_, index=index: self.enter(index))
            block.register_forward_hook(lambda *_: self.enter(None))
            block.mlp.register_forward_pre_hook(lambda *_, index=index: self.order.append(index))

    def enter(self, index):
        self.current = index


def saved_bytes(model, batch):
    """Bytes that autograd saves by layer (None: outside the layers), the model's weights left out.

    And the outputs of the layers.
    """
    forwards, outputs = Forwards(model), []
    for block in blocks(model):
        block.register_forward_hook(lambda module, args, output: outputs.append(output))
    owned = {p.untyped_storage().data_ptr() for p in model.parameters()}
    found, kept = Counter(), {}

    def pack(tensor):
        place = tensor.untyped_storage().data_ptr()
        if place not in owned and place not in kept:
            kept[place] = tensor
            found[forwards.current] += tensor.untyped_storage().nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        loss = loss_of(model, batch)
    return found, outputs, loss


class LivingBytes(TorchDispatchMode):
    """Bytes of the tensors made in this context and still alive, a model's weights left out."""

    def __init__(self, model):
        super().__init__()
        self.storages = {}
        self.weights = {p.untyped_storage()._cdata for p in model.parameters()}

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **kwargs or {})
        for tensor in tree_leaves(result):
            if isinstance(tensor, torch.Tensor):
                storage = tensor.untyped_storage()
                self.storages[storage._cdata] = (StorageWeakRef(storage), storage.nbytes())
        return result

    def count(self):
        made = [s for place, s in self.storages.items() if place not in self.weights]
        return sum(size for storage, size in made if not storage.expired())


class CountedOps(TorchDispatchMode):
    """How often each operation runs."""

    def __init__(self):
        super().__init__()
        self.counts = Counter()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.counts[str(func)] += 1
        return func(*args, **kwargs or {})


LAYOUTS = pytest.mark.parametrize("layout", ["padded", "shared_prefix"])


@LAYOUTS
@pytest.mark.parametrize("kind", ["llama", "gpt2"])
@pytest.mark.parametrize("way", WAYS)
def test_frozen_layers_below_save_nothing_and_end_the_graph(way, kind, layout):
    found, outputs, _ = saved_bytes(prepared(way, kind), a_batch(layout))
    assert found[0] == found[1] == 0 and found[2] > 0 and found[3] > 0
    assert [output.requires_grad for output in outputs] == [False, False, True, True]


def test_without_a_mask_all_layers_save():
    """The measure itself: every layer saves as much as the next."""
    model = deep_model().train()
    enable_shared_prefix(model)
    found, outputs, _ = saved_bytes(model, a_batch())
    assert found[1] == found[2] > 0 and found[0] >= found[1]
    assert all(output.requires_grad for output in outputs)


@pytest.mark.parametrize("way", WAYS)
def test_a_backward_costs_the_same_however_many_layers_lie_below(way):
    counts = []
    for below in (0, 1, 3):
        loss = loss_of(prepared(way, layers=below + 2, top=(below, below + 1)), a_batch())
        with CountedOps() as ops:
            loss.backward()
        counts.append(ops.counts)
    assert counts[1] == counts[2] and sum(counts[1].values()) > 50
    # With nothing below, the gradient of the embedding's output is not needed either.
    assert counts[0] == counts[1]


@LAYOUTS
@pytest.mark.parametrize("way", WAYS)
def test_checkpointing_recomputes_trained_layers_alone_and_keeps_less(way, layout):
    batch, grads, living = a_batch(layout), [], []
    for checkpointing in (False, True):
        model = prepared(way, checkpointing=checkpointing)
        forwards = Forwards(model)
        with LivingBytes(model) as made:
            loss = loss_of(model, batch)
            living.append(made.count())
        loss.backward()
        grads.append({name: parameter.grad for name, parameter in trainable(model)})
        assert forwards.order == [0, 1, 2, 3, *([3, 2] if checkpointing else [])]
    assert living[1] < 0.2 * living[0]  # two layers' inputs, rotations and the batch's masks
    for name, grad in grads[0].items():
        assert grad.any() and torch.equal(grads[1][name], grad), name


class CountForwards(lightning.Callback):
    """Which layers a fit runs."""

    def on_fit_start(self, trainer, pl_module):
        self.forwards = Forwards(pl_module.model)


@pytest.mark.parametrize("precision", ["32-true", "bf16-mixed", "bf16-true"])
def test_a_run_with_checkpointing_is_the_run_without(precision, tiny_llama_dir, tmp_path):
    mask = top_mask(tiny_model(), "element", top=(1,))
    mask.save(tmp_path / "mask")
    runs = []
    for checkpointing in (False, True):
        module = MaskedDPO(
            str(tiny_llama_dir), learning_rate=1e-2, gradient_checkpointing=checkpointing
        )
        counter = CountForwards()
        callbacks = [counter, KeyParameterLocalization(mask=str(tmp_path / "mask"))]
        run = trainer(tmp_path, callbacks=callbacks, precision=precision)
        run.fit(module, preferences(8))
        assert counter.forwards.order == ([0, 1, 1] if checkpointing else [0, 1]) * 2  # two steps
        runs.append(weights(module))
    assert_equal_weights(*runs)
    start = tiny_model().to(next(iter(runs[0].values())).dtype).state_dict()
    changed = {name for name, values in runs[0].items() if not torch.equal(values, start[name])}
    assert changed and all(".layers.1." in name for name in changed)
