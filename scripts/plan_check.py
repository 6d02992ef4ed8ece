"""`lit-align plan` against measured peaks: real steps of the embedded model on the CPU.

    python scripts/plan_check.py [--only rows-padded ...] [--out plan_check.json]

Every case trains three steps with `lightning.Trainer` in a process of its own, on made-up token ids
of the lengths that the plan is made for. Measured is the peak of the resident memory during the
steps, less what was resident after the imports; glibc is told to give freed blocks back
(`MALLOC_*` below), as the plan counts them as free.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

LENGTHS = ((126, 60, 40),) * 2
CASES: dict[str, dict[str, Any]] = {
    f"{name}-{layout}{'-checkpointed' * checkpointed}": case
    | {"layout": layout, "gradient_checkpointing": checkpointed}
    for layout in ("padded", "shared_prefix")
    for checkpointed in (False, True)
    for name, case in {
        "full": {"mask": "none"},
        "elements": {"mask": "elements", "ratio": 0.1},
        "rows": {"mask": "rows", "ratio": 0.1},
        "heads": {"mask": "heads", "ratio": 0.1},
        "layers": {"mask": "layers", "ratio": 0.3},
        "lora": {"mask": "none", "adapter": "lora"},
    }.items()
}
ALLOWED = 0.10
# Blocks from 64 KiB on are mapped one by one, and go back to the system when they are freed.
MALLOC = {
    "MALLOC_MMAP_THRESHOLD_": "65536",
    "MALLOC_TRIM_THRESHOLD_": "65536",
    "MALLOC_ARENA_MAX": "1",
}
MIB = 1 << 20


def settings_of(case: dict[str, Any], model: str) -> Any:
    """The plan's settings for a case."""
    from lit_align.compact.adapter_settings import AdapterSettings
    from lit_align.planning import PlanSettings

    adapter = AdapterSettings() if case.get("adapter") else None
    rest = {n: v for n, v in case.items() if n != "adapter"}
    return PlanSettings(model, LENGTHS, adapter=adapter, device="cpu", precision="32-true", **rest)


def planned(case: dict[str, Any], model: str) -> dict[str, Any]:
    """Peak and parts of the plan, MiB."""
    from lit_align.planning import on_each_device, step_memory

    settings = settings_of(case, model)
    memory, _ = on_each_device(step_memory(settings), settings)
    parts = {part: round(n / MIB, 1) for part, n in memory.peak.items() if n > MIB / 20}
    return {"mib": memory.peak.total() / MIB, "parts_mib": parts}


def measured(case: dict[str, Any], model: str) -> dict[str, Any]:
    """Train three steps in this process; the peak above what the imports left, MiB."""
    import lightning

    import lit_align.cli  # noqa: F401 - what a run imports
    from lit_align.callbacks import KeyParameterLocalization
    from lit_align.compact.adapter_settings import AdapterSettings
    from lit_align.data import PreferenceDataModule
    from lit_align.data.schema import PreferenceRow
    from lit_align.language_model import load_tokenizer
    from lit_align.modules import MaskedDPO
    from lit_align.peak_memory import PeakMemory

    with PeakMemory() as imports:
        pass
    assert imports.mib is not None
    peak = PeakMemory()

    class Steps(lightning.Callback):
        def on_train_start(self, trainer: Any, module: Any) -> None:
            peak.__enter__()

        def on_train_batch_end(self, trainer: Any, module: Any, *_: Any) -> None:
            if trainer.global_step == 3:
                peak.__exit__(None, None, None)

    rows = [PreferenceRow([3] * p, [4] * c, [5] * r) for _ in range(3) for p, c, r in LENGTHS]
    with tempfile.TemporaryDirectory() as folder:
        callbacks: list[Any] = [Steps()]
        if case["mask"] != "none":
            callbacks.append(KeyParameterLocalization(mask=str(case["file"])))
        module = MaskedDPO(
            model,
            gradient_checkpointing=case["gradient_checkpointing"],
            adapter=AdapterSettings() if case.get("adapter") else None,
        )
        data = PreferenceDataModule.from_rows(
            load_tokenizer(model), {"train": rows}, batch_size=len(LENGTHS),
            layout=case["layout"], group_by_length=False,
        )  # fmt: skip
        trainer = lightning.Trainer(
            accelerator="cpu", devices=1, max_steps=3, callbacks=callbacks, logger=False,
            enable_checkpointing=False, enable_progress_bar=False, enable_model_summary=False,
            default_root_dir=folder,
        )  # fmt: skip
        trainer.fit(module, datamodule=data)
    assert peak.mib is not None
    return {"mib": peak.mib - imports.mib, "imports_mib": imports.mib}


def write_mask(case: dict[str, Any], model: str, path: Path) -> None:
    """The mask that the plan supposes, as a file."""
    import torch

    from lit_align.masks import ParameterMask
    from lit_align.masks.granularity import Selection
    from lit_align.planning.masks import evenly, planned_mask, selections
    from lit_align.planning.model_configs import read_config, weightless_model

    with torch.device("meta"):
        found = weightless_model(read_config(model), torch.float32)
    if case["mask"] == "elements":
        shapes = {n: tuple(p.shape) for n, p in found.named_parameters()}
        counts = planned_mask(found, "elements", case["ratio"]).selections
        chosen = {
            n: Selection.of_positions(
                s, torch.from_numpy(evenly(found.get_parameter(n).numel(), counts[n].count))
            )
            for n, s in shapes.items()
        }
    else:
        chosen = selections(found, case["mask"], case["ratio"])
    ParameterMask(chosen).save(path)


def in_own_process(what: str, case: dict[str, Any], model: str) -> dict[str, Any]:
    """A function of this file in a fresh process; its result."""
    words = [sys.executable, __file__, "--run", what, json.dumps(case), "--model", model]
    environment = os.environ | MALLOC
    found = subprocess.run(words, check=True, capture_output=True, text=True, env=environment)
    return json.loads(found.stdout.splitlines()[-1])


def main() -> None:
    """Every case, planned and measured."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", default="smollm2-135m-instruct-q4")
    parser.add_argument("--only", nargs="*", default=list(CASES), choices=list(CASES))
    parser.add_argument("--out", type=Path)
    parser.add_argument("--run", nargs=2, help=argparse.SUPPRESS)
    words = parser.parse_args()
    if words.run:
        what, case = words.run
        functions = {"planned": planned, "measured": measured}
        print(json.dumps(functions[what](json.loads(case), words.model)))
        return
    results = {}
    print(f"| {'case':<36} | {'planned MiB':>11} | {'measured MiB':>12} | {'deviation':>9} |")
    with tempfile.TemporaryDirectory() as folder:
        for name in words.only:
            case = dict(CASES[name])
            plan = in_own_process("planned", case, words.model)
            if case["mask"] != "none":
                case["file"] = str(Path(folder) / f"{case['mask']}.safetensors")
                if not Path(case["file"]).exists():
                    write_mask(case, words.model, Path(case["file"]))
            real = in_own_process("measured", case, words.model)
            deviation = plan["mib"] / real["mib"] - 1
            results[name] = {"planned": plan, "measured": real, "deviation": deviation}
            figures = f"{plan['mib']:>11.0f} | {real['mib']:>12.0f} | {deviation:>+9.1%}"
            print(f"| {name:<36} | {figures} |", flush=True)
    if words.out:
        words.out.write_text(json.dumps(results, indent=2) + "\n")
    if any(abs(r["deviation"]) > ALLOWED for r in results.values()):
        raise SystemExit(f"a plan is more than {ALLOWED:.0%} off")


if __name__ == "__main__":
    main()
