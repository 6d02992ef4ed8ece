"""Settings of a whole ALLO run on a tiny model, in seconds."""

import dataclasses
from pathlib import Path
from typing import Any

from lit_align.pipelines import settings as s
from lit_align.pipelines.allo import allo

TINY: dict[str, Any] = {
    "data": s.DataSettings(train_rows=8, held_out_rows=4),
    "sft": s.SFTSettings(learning_rate=1e-3, epochs=1),
    "sample": s.SampleSettings(num_samples=3, max_new_tokens=6),
    "warm_up": s.DPOSettings(learning_rate=1e-4, warmup_ratio=0.0),
    "locate": s.LocateSettings(forget_ratio=0.05, improve_ratio=0.1),
    "token_rewards": s.TokenRewardSettings(kind="edit", learning_rate=1e-3, epochs=1),
    "forget": s.ForgetSettings(learning_rate=1e-3),
    "improve": s.ImproveSettings(learning_rate=1e-3),
    "evaluate": s.EvaluateSettings(max_new_tokens=6),
    "run": s.RunSettings(accelerator="cpu"),
}


def tiny_allo(model: Path | str, output: Path, **changes: Any) -> dict[str, Any]:
    """Run it; a change is a dict of a group's fields, or the value of a plain argument."""
    arguments = dict(TINY)
    for name, change in changes.items():
        if isinstance(change, dict):
            change = dataclasses.replace(TINY[name], **change)
        arguments[name] = change
    return allo(str(output), str(model), **arguments)
