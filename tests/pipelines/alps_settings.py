"""Settings of a whole ALPS run on a tiny model, in seconds."""

import dataclasses
from pathlib import Path
from typing import Any

from lit_align.compact.adapters import AdapterSettings
from lit_align.pipelines.alps import alps
from lit_align.pipelines.alps import settings as s
from lit_align.pipelines.settings import RunSettings

DATA = Path(__file__).resolve().parents[2] / "configs" / "data"
TINY: dict[str, Any] = {
    "data": s.ALPSDataSettings(train_files=(str(DATA / "sft.jsonl"),), validation_fraction=0.2),
    "locate": s.LocateHeadsSettings(ratio=0.25),
    "train": s.ALPSTrainSettings(learning_rate=1e-3, epochs=1, batch_size=4),
    "compare": s.CompareSettings(
        baselines=(), lora=AdapterSettings(rank=2, alpha=4.0), lora_learning_rate=1e-2
    ),
    "run": RunSettings(accelerator="cpu"),
}


def tiny_alps(model: Path | str, output: Path, **changes: Any) -> dict[str, Any]:
    """Run it; a change is a dict of a group's fields, or the value of a plain argument."""
    arguments = dict(TINY)
    for name, change in changes.items():
        if isinstance(change, dict):
            change = dataclasses.replace(TINY[name], **change)
        arguments[name] = change
    return alps(str(output), str(model), **arguments)
