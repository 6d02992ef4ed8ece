"""ILA's Table 11 (arXiv 2410.17875) beside `lit-align plan`, as a Markdown table.

    python scripts/ila_memory_table.py

Llama 2-7B, a batch of 2 x 1024 tokens, one GPU, supervised fine-tuning in bf16. The paper names
neither precision nor optimiser. Of its numbers: 81,276 MiB for full fine-tuning are 12.6 bytes for
each parameter, too few for fp32 weights, gradients and moments (16) or for bf16 with fp32 masters
(16 to 18), and the 20 GiB that LoRA takes beside its weights say that activations were kept. So
weights, gradients and moments had 16 bits, 8 bytes a parameter, and the rest is activations.
lit-align's moments are fp32 always; masters are fp32 or left out (stochastic rounding).
"""

from __future__ import annotations

from typing import Any

from lit_align.compact.adapter_settings import AdapterSettings
from lit_align.planning import PlanSettings, step_memory

MIB = 1 << 20
LENGTHS = ((1, 1023),) * 2  # every token but the first is a target
LORA, QLORA = AdapterSettings(), AdapterSettings(quantization="nf4")
ILA: dict[str, Any] = {"mask": "layers", "ratio": 0.3}
ROWS: dict[str, tuple[int, dict[str, Any]]] = {  # name: (the paper's MiB, settings)
    "Full Fine-tune (100 %)": (81276, {}),
    "Full Fine-tune w/ ILA (30 %)": (33458, ILA),
    "LoRA (100 %)": (32752, {"adapter": LORA}),
    "LoRA w/ ILA (30 %)": (28586, {"adapter": LORA} | ILA),
    "QLoRA (100 %)": (26238, {"adapter": QLORA}),
    "QLoRA w/ ILA (30 %)": (17912, {"adapter": QLORA} | ILA),
}


def planned_mib(settings: dict[str, Any], **more: Any) -> tuple[int, int]:
    """Peak and what lives between steps, MiB."""
    plan = PlanSettings("llama-2-7b", LENGTHS, method="sft", **settings | more)
    memory = step_memory(plan)
    return round(memory.peak.total() / MIB), round(memory.persistent.total() / MIB)


def main() -> None:
    """Print the table."""
    print("| | paper | plan, bf16 | of it between steps | fp32 masters left out | checkpointed |")
    print("|---|---:|---:|---:|---:|---:|", flush=True)
    for name, (paper, settings) in ROWS.items():
        peak, between = planned_mib(settings)
        bare = "" if "adapter" in settings else f"{planned_mib(settings, masters=False)[0]:,}"
        thrifty, _ = planned_mib(settings, gradient_checkpointing=True)
        print(f"| {name} | {paper:,} | {peak:,} | {between:,} | {bare} | {thrifty:,} |", flush=True)


if __name__ == "__main__":
    main()
