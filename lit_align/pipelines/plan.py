"""`lit-align plan`: the memory of a training step by part, before anything is loaded."""

from __future__ import annotations

import json
from collections import Counter
from typing import Any, Literal, TypeAlias

from lit_align.compact.adapter_settings import AdapterSettings
from lit_align.data.shared_prefix import Layout
from lit_align.errors import TrainingError
from lit_align.modules.activation_checkpointing import GradientCheckpointing
from lit_align.planning.settings import (
    Method,
    PlanDevice,
    PlanPrecision,
    PlanReference,
    PlanSettings,
    Strategy,
)
from lit_align.planning.sharding import on_each_device
from lit_align.planning.step import StepMemory, step_memory

MIB = 1 << 20
PlannedAdapter: TypeAlias = Literal["none", "lora", "adalora", "qlora"]
NOT_COUNTED = {
    "gpu": "Not counted: the CUDA context (0.3 to 0.6 GiB), cuBLAS workspaces, what the caching "
    "allocator loses to fragmentation, other processes.",
    "cpu": "Not counted: what the imports themselves take (about 0.6 GiB), scratch space of the "
    "matrix libraries, what the C allocator keeps of freed memory.",
}


def plan(
    model: str = "llama-3.1-8b",
    method: Method = "dpo",
    mask: str = "none",
    ratio: float = 0.1,
    adapter: PlannedAdapter = "none",
    rank: int = 32,
    batch_size: int = 2,
    prompt_tokens: int = 512,
    response_tokens: int = 512,
    max_tokens: int | None = None,
    layout: Layout | None = None,
    precision: PlanPrecision | None = None,
    masters: bool = True,
    gradient_checkpointing: GradientCheckpointing = False,
    reference: PlanReference = "cache",
    strategy: Strategy | None = None,
    devices: int = 1,
    device: PlanDevice = "gpu",
    as_json: bool = False,
) -> None:
    """Print the memory that a training step takes on each device, by part.

    The module's own step (forward, loss, backward, optimiser) runs on tensors without values: no
    weights are needed and next to no memory is used.

    Args:
        model: llama-2-7b, llama-3.1-8b, llama-3-70b, mistral-7b, a config.json, a model folder, a
            hub id or the alias of the embedded model.
        method: dpo, npo, sft, or ila (learning gates of all layers).
        mask: none (everything trains, or every layer has an adapter), full, elements, rows, heads,
            layers, or a mask file.
        ratio: share of a mask's units.
        adapter: lora, adalora or qlora in place of the weights.
        rank: of the adapter.
        batch_size: pairs (dpo) or sequences of a batch, on each device.
        prompt_tokens: of each prompt.
        response_tokens: of each response.
        max_tokens: of a packed row, with layout shared_prefix, in place of batch_size.
        layout: padded or shared_prefix; None: shared_prefix for dpo, else padded.
        precision: 32-true, bf16-mixed or bf16-true; None: bf16-true on a GPU, 32-true on a CPU.
        masters: with bf16-true, train in fp32 masters; false: round stochastically without them.
        gradient_checkpointing: true keeps the inputs of layers alone, selective also the results
            of matrix products and attention.
        reference: cache, swap or none, of methods with a reference.
        strategy: one_device, ddp or fsdp2; None: one_device, or ddp on several devices.
        devices: how many GPUs share the work.
        device: gpu or cpu.
        as_json: print JSON in place of the table.
    """
    row = (prompt_tokens, response_tokens) + (response_tokens,) * (method == "dpo")
    settings = PlanSettings(
        model=model,
        lengths=[row] * _rows_of_a_batch(row, batch_size, max_tokens, layout, method),
        method=method,
        mask=mask,
        ratio=ratio,
        adapter=_adapter(adapter, rank),
        layout=layout,
        precision=precision or ("bf16-true" if device == "gpu" else "32-true"),
        masters=masters,
        gradient_checkpointing=gradient_checkpointing,
        reference=reference,
        strategy=strategy or ("ddp" if devices > 1 else "one_device"),
        devices=devices,
        device=device,
    )
    memory, assumed = on_each_device(step_memory(settings), settings)
    if as_json:
        print(json.dumps(_as_json(memory, settings, assumed), indent=2))
    else:
        print(_table(memory, settings, assumed))


def _adapter(kind: PlannedAdapter, rank: int) -> AdapterSettings | None:
    if kind == "none":
        return None
    if kind == "qlora":
        return AdapterSettings("lora", rank=rank, quantization="nf4")
    return AdapterSettings(kind, rank=rank)


def _rows_of_a_batch(
    row: tuple[int, ...],
    batch_size: int,
    max_tokens: int | None,
    layout: Layout | None,
    method: Method,
) -> int:
    if batch_size < 1:
        raise TrainingError(f"batch_size {batch_size}: at least 1")
    if max_tokens is None:
        return batch_size
    if (layout or ("shared_prefix" if method == "dpo" else "padded")) != "shared_prefix":
        raise TrainingError("max_tokens is of layout shared_prefix: give batch_size")
    packed = row[0] + sum(response - 1 for response in row[1:])
    if packed > max_tokens:
        raise TrainingError(f"a row has {packed} tokens, more than max_tokens {max_tokens}")
    return max_tokens // packed


def _as_json(memory: StepMemory, settings: PlanSettings, assumed: list[str]) -> dict[str, Any]:
    return {
        "settings": settings.describe(),
        "parameters": memory.parameters,
        "trained": memory.trained,
        "peak_bytes": memory.peak.total(),
        "peak_parts_bytes": dict(memory.peak),
        "persistent_bytes": memory.persistent.total(),
        "persistent_parts_bytes": dict(memory.persistent),
        "assumed": assumed,
        "not_counted": NOT_COUNTED[settings.device],
    }


def _table(memory: StepMemory, settings: PlanSettings, assumed: list[str]) -> str:
    """Parts in the order of their size at the peak, MiB."""
    s = settings
    lines = [
        f"{s.model}, {s.method}, mask {s.mask}, {s.precision}, {s.strategy} on {s.devices} "
        f"{s.device}: {memory.trained:,} of {memory.parameters:,} parameters train",
        "",
        f"{'MiB on each device':<24}{'between steps':>16}{'at the peak':>16}",
    ]
    parts = memory.peak | Counter(memory.persistent)
    for part in sorted(parts, key=lambda p: (-memory.peak[p], -memory.persistent[p])):
        between, peak = memory.persistent[part] / MIB, memory.peak[part] / MIB
        if max(between, peak) >= 0.05:
            lines.append(f"{part:<24}{between:>16,.1f}{peak:>16,.1f}")
    between, peak = memory.persistent.total() / MIB, memory.peak.total() / MIB
    lines += [f"{'all':<24}{between:>16,.1f}{peak:>16,.1f}", ""]
    return "\n".join([*lines, *(f"Assumed: {line}." for line in assumed), NOT_COUNTED[s.device]])
