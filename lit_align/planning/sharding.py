"""From the step of one device to what each GPU of a strategy holds."""

from __future__ import annotations

from collections import Counter

from lit_align.planning.settings import PlanSettings
from lit_align.planning.step import StepMemory

# What FSDP2 divides: everything that is a Parameter or has a Parameter's size.
SHARDED = ("weights", "selected entries", "optimiser moments", "gradients", "adapters")
GATHERED = "gathered layers"
BUCKETS = "DDP's buckets"
# What a first step loads of torch's libraries, after all imports: measured with a model of 260,000
# parameters (69.5 MiB, of which 27.0 are its tensors).
CODE, CODE_BYTES = "libraries' code", 42 << 20


def on_each_device(memory: StepMemory, settings: PlanSettings) -> tuple[StepMemory, list[str]]:
    """Memory of each device, and what was assumed.

    The batch is each GPU's own: activations and logits are those of one device.
    """
    if settings.device == "cpu":
        memory = memory.with_parts(1, (), Counter({CODE: CODE_BYTES}), Counter())
    if settings.strategy == "one_device":
        return memory, []
    if settings.strategy == "ddp":
        # Its buckets are as large as the gradients, whose values they take to be sent.
        extra = Counter({BUCKETS: memory.trained_bytes})
        assumed = "DDP holds everything on every GPU, and buckets of the gradients' size"
        return memory.with_parts(1, (), extra, Counter()), [assumed]
    gathered = Counter({GATHERED: 2 * memory.largest_block_bytes + memory.outside_bytes})
    assumed = (
        f"FSDP2 divides {', '.join(SHARDED)} by {settings.devices} GPUs; index tables and base "
        "values of a mask stay whole on each; at work are the parameters of one layer and of the "
        "next one, gathered ahead, and those outside the layers (embedding, head)"
    )
    return memory.with_parts(settings.devices, SHARDED, Counter(), gathered), [assumed]
