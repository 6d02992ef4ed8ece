"""One ALLO run: its settings, and where its outputs stand."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

from lit_align.language_model import load_language_model, resolve_model
from lit_align.pipelines.rows import CONTENT, NUMBER, PAIR, QUESTION, Row, read_jsonl
from lit_align.pipelines.run_folder import MODEL_FOLDER
from lit_align.pipelines.settings import (
    DataSettings,
    DPOSettings,
    EvaluateSettings,
    ForgetSettings,
    ImproveSettings,
    LocateSettings,
    RunSettings,
    SampleSettings,
    SFTSettings,
    TokenRewardSettings,
    TrainSettings,
)
from lit_align.pipelines.training import inference_device, module_settings

DELTA_FILE = "delta.safetensors"
MASK_FILE = "mask.safetensors"
ROWS: dict[str, dict[str, Any]] = {
    "train": QUESTION,
    "held_out": QUESTION,
    "sampled": QUESTION | {"right": [str], "wrong": [str]},
    "pairs": PAIR,
    "wrong": QUESTION | {"response": CONTENT},
    "weighted": {"prompt": CONTENT, "response": CONTENT, "token_weights": [NUMBER]},
}


@dataclasses.dataclass(frozen=True)
class AlloRun:
    """Settings of all stages; every stage is a function of a run and its own folder.

    Attributes:
        output: folder of the run; stage `x` writes into `output / "x"`.
        model: local folder, hub id or alias of the model to align.
        data: of the stage of that name, as are the settings below.
        sft: likewise.
        sample: likewise.
        warm_up: likewise.
        locate: likewise.
        token_rewards: likewise.
        forget: likewise.
        improve: likewise.
        evaluate: likewise.
        machine: precision, device, seed.
        merge_model: also write start + delta as an ordinary model folder.
    """

    output: Path
    model: str
    data: DataSettings
    sft: SFTSettings
    sample: SampleSettings
    warm_up: DPOSettings
    locate: LocateSettings
    token_rewards: TokenRewardSettings
    forget: ForgetSettings
    improve: ImproveSettings
    evaluate: EvaluateSettings
    machine: RunSettings
    merge_model: bool

    @property
    def start(self) -> Path:
        """The folder that everything after supervised fine-tuning starts from."""
        return self.output / "sft" / MODEL_FOLDER if self.sft.enabled else resolve_model(self.model)

    def start_inputs(self) -> list[Path | str]:
        """The start, as an input of a stage."""
        return ["sft"] if self.sft.enabled else [self.start]

    @property
    def max_length(self) -> int:
        """Most tokens that every training of the policy takes."""
        trained = [s for s in (self.sft, self.forget) if s.enabled]
        return min(s.max_length for s in (*trained, self.warm_up, self.improve))

    def rows(self, stage: str, name: str) -> list[Row]:
        """Rows that a stage wrote."""
        return read_jsonl(self.output / stage / f"{name}.jsonl", ROWS[name])

    def module_settings(self, settings: TrainSettings) -> dict[str, Any]:
        """What a module of a stage takes."""
        return {"model": str(self.start)} | module_settings(settings, self.machine)

    def mask(self, name: str) -> Path:
        """File of N1 (`n1`) or N2 (`n2`)."""
        return self.output / "locate" / f"{name}.safetensors"

    def load(self, folder: Path) -> Any:
        """Model and tokenizer, where the model is fast."""
        model, tokenizer = load_language_model(folder)
        model.to(inference_device(self.machine.accelerator))  # type: ignore[arg-type]
        return model, tokenizer
