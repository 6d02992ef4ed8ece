"""Settings of a whole ILA run on a tiny model, in seconds."""

import dataclasses
from pathlib import Path
from typing import Any

from lit_align.compact.adapters import AdapterSettings
from lit_align.pipelines.ila import ila
from lit_align.pipelines.ila import settings as s
from lit_align.pipelines.settings import RunSettings

DATA = Path(__file__).resolve().parents[2] / "configs" / "data"
ADAPTER = AdapterSettings(rank=2, alpha=4.0, dropout=0.0)
TINY: dict[str, Any] = {
    "data": s.ILADataSettings(train_files=(str(DATA / "sft.jsonl"),), validation_fraction=0.2),
    "stage1": s.Stage1Settings(
        learning_rate=1e-2, full_learning_rate=1e-3, epochs=1, batch_size=4, adapter=ADAPTER
    ),
    "stage2": s.Stage2Settings(batches=3, batch_size=4),
    "use": s.UseSettings(
        learning_rate=1e-2, full_learning_rate=1e-3, epochs=1, batch_size=4, adapter=ADAPTER,
        top=(0.3,), freeze=(), baselines=(),
    ),
    "run": RunSettings(accelerator="cpu"),
}  # fmt: skip


def tiny_ila(model: Path | str, output: Path, **changes: Any) -> dict[str, Any]:
    """Run it; a change is a dict of a group's fields."""
    groups = {n: dataclasses.replace(v, **changes.get(n, {})) for n, v in TINY.items()}
    assert not set(changes) - set(TINY)
    return ila(str(output), str(model), **groups)
