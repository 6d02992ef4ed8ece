"""The real training step on fake tensors, and what memory it takes."""

from __future__ import annotations

import contextlib
import dataclasses
import warnings
from collections import Counter
from collections.abc import Iterator, Sequence
from typing import Any
from unittest import mock

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.nn.modules.module import (
    register_module_forward_hook,
    register_module_forward_pre_hook,
)

from lit_align.batch import PackedBatch
from lit_align.compact.adapters import has_adapters
from lit_align.compact.state import links
from lit_align.masks.table import split_name
from lit_align.modules import ila_mask_learning
from lit_align.modules.base import LanguageModelModule
from lit_align.planning.masks import PlannedMask
from lit_align.planning.modules import (
    low_rank_change,
    made_up_batch,
    mask_of,
    planned_module,
)
from lit_align.planning.settings import PlanSettings
from lit_align.planning.stand_ins import weightless
from lit_align.planning.tracker import MemoryTracker
from lit_align_kernels import token_logprobs, weighted_preference_loss

HEAD = "logits and head"


@dataclasses.dataclass(frozen=True)
class StepMemory:
    """What a step takes.

    Attributes:
        persistent: bytes by part between two steps, the gradients not among them.
        peak: bytes by part when the most was in use.
        parameters: entries of the model.
        trained: entries that train.
        trained_bytes: their gradients' size.
        largest_block_bytes: parameters of the largest transformer layer.
        outside_bytes: parameters outside the layers.
    """

    persistent: Counter[str]
    peak: Counter[str]
    parameters: int
    trained: int
    trained_bytes: int
    largest_block_bytes: int
    outside_bytes: int

    def with_parts(
        self, devices: int, divided: Sequence[str], always: Counter[str], at_peak: Counter[str]
    ) -> StepMemory:
        """The same with some parts divided among devices, and others added."""

        def share(part: str, num_bytes: int) -> int:
            return -(-num_bytes // devices) if part in divided else num_bytes

        persistent = Counter({p: share(p, n) for p, n in self.persistent.items()}) + always
        peak = Counter({p: share(p, n) for p, n in self.peak.items()}) + always + at_peak
        return dataclasses.replace(self, persistent=persistent, peak=peak)


def step_memory(settings: PlanSettings) -> StepMemory:
    """Run two training steps of one device on fake tensors; the second one's memory counts.

    Raises:
        LitAlignError: the module itself refuses the settings, or the model or mask is none.
    """
    mask, batch = mask_of(settings), made_up_batch(settings)
    padded = bool((batch.attention_mask == 0).any())
    with (
        warnings.catch_warnings(),
        FakeTensorMode() as fake,
        MemoryTracker() as tracker,
        weightless(padded=padded, gpu=settings.device == "gpu"),
        parts_of_calls(tracker),
    ):
        warnings.filterwarnings("ignore", message="Accessing the data pointer of FakeTensor")
        batch = batch._mapped(fake.from_tensor)
        tracker.tag((v for v in vars(batch).values() if isinstance(v, Tensor)), "batch")
        return run_steps(settings, mask, batch, tracker)


def run_steps(
    settings: PlanSettings, mask: Any, batch: PackedBatch, tracker: MemoryTracker
) -> StepMemory:
    """Two training steps under a tracker, on fake tensors or, with a `ParameterMask`, real ones."""
    module, trainer = planned_module(settings, mask)
    with (
        tracker.counting_as("weights"),
        mock.patch.object(ila_mask_learning, "read_change", low_rank_change),
    ):
        module.configure_model()
    model = module.model
    parameters = _tag_model(tracker, model)
    tables = mask.tables() if isinstance(mask, PlannedMask) and not has_adapters(model) else []
    tracker.tag(tables, "mask")
    configured: Any = module.configure_optimizers()
    optimizer = configured["optimizer"]
    _step(module, batch, optimizer, trainer, tracker)
    start = tracker.mark()
    _step(module, batch, optimizer, trainer, tracker)
    persistent = tracker.live()
    trained = [p for p in model.parameters() if p.requires_grad]
    blocks = _bytes_by_block(model)
    return StepMemory(
        persistent=persistent,
        peak=tracker.peak(start),
        parameters=parameters,
        trained=sum(p.numel() for p in trained),
        trained_bytes=sum(_num_bytes(p) for p in trained),
        largest_block_bytes=max(n for block, n in blocks.items() if block is not None),
        outside_bytes=blocks[None],
    )


def _num_bytes(tensor: Tensor) -> int:
    return tensor.numel() * tensor.element_size()


def _bytes_by_block(model: nn.Module) -> Counter[int | None]:
    """Bytes of the parameters of each transformer layer; None: outside of them."""
    found: Counter[int | None] = Counter()
    for name, parameter in model.named_parameters():
        found[split_name(name)[0]] += _num_bytes(parameter)
    return found


def _step(
    module: LanguageModelModule,
    batch: PackedBatch,
    optimizer: torch.optim.Optimizer,
    trainer: Any,
    tracker: MemoryTracker,
) -> None:
    """One optimiser step, in Lightning's order: the last gradients live until the backward."""
    with tracker.counting_as("activations"), trainer.precision_plugin.forward_context():
        loss = module.training_step(batch, 0)
    optimizer.zero_grad()
    with tracker.counting_as("temporary"), _recomputed(tracker):
        loss.backward()
    del loss
    tracker.tag((p.grad for p in module.parameters()), "gradients")
    with tracker.counting_as("temporary"):
        module.on_before_optimizer_step(optimizer)
        optimizer.step()
    moments = (v for s in optimizer.state.values() for v in s.values() if isinstance(v, Tensor))
    tracker.tag(moments, "optimiser moments")


def _tag_model(tracker: MemoryTracker, model: nn.Module) -> int:
    """Tell apart what the model holds; the number of the base's entries."""
    tracker.tag(model.parameters(), "weights")
    tracker.tag(model.buffers(), "weights")
    own = [p for p in model.parameters()]
    if has_adapters(model):
        adapters = [p for p in own if p.requires_grad]
        tracker.tag(adapters, "adapters")
        return sum(p.numel() for p in own) - sum(p.numel() for p in adapters)
    found = links(model)
    selected = {id(k.selected) for k in found if not k.is_whole}
    for link in found:
        e = link.state.entries
        if not link.is_whole:
            tracker.tag([link.selected], "selected entries")
        tracker.tag([link.state.base], "base values")
        tracker.tag([e.rows, e.positions, e.row_offsets], "mask")
    return sum(p.numel() for p in own if id(p) not in selected)


@contextlib.contextmanager
def _recomputed(tracker: MemoryTracker) -> Iterator[None]:
    """Modules that are called in a backward compute their activations again."""
    calls: list[Any] = []

    def enter(module: nn.Module, inputs: Any) -> None:
        calls.append(tracker.counting_as("activations"))
        calls[-1].__enter__()

    def leave(module: nn.Module, inputs: Any, output: Any) -> None:
        calls.pop().__exit__(None, None, None)

    hooks = (
        register_module_forward_pre_hook(enter),
        register_module_forward_hook(leave, always_call=True),
    )
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()


@contextlib.contextmanager
def parts_of_calls(tracker: MemoryTracker) -> Iterator[None]:
    """Count what the head's functions make as the head's."""
    with contextlib.ExitStack() as stack:
        for owner, name in (
            (weighted_preference_loss._OnePass, "forward"),
            (token_logprobs._TokenLogprobs, "forward"),
            (token_logprobs._TokenLogprobs, "backward"),
        ):
            original = getattr(owner, name)

            def counted(*args: Any, original: Any = original) -> Any:
                with tracker.counting_as(HEAD):
                    return original(*args)

            stack.enter_context(mock.patch.object(owner, name, staticmethod(counted)))
        yield
