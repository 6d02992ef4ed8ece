"""The smaller verbs of the command line: evaluate, export."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any, Literal, TypeAlias

from torch import Tensor, nn
from transformers import PreTrainedTokenizerBase

from lit_align.compact import (
    AdapterSettings,
    add_adapters,
    apply_adapters,
    apply_delta,
    export_delta,
    has_adapters,
    load_trainable,
    restrict,
    save_adapters,
)
from lit_align.compact.state import trainable_name
from lit_align.compact.trainable import trainable
from lit_align.data import RowTokenizer
from lit_align.data.templates import chat_template_text
from lit_align.errors import DataError, TrainingError
from lit_align.evaluation import evaluate
from lit_align.language_model import (
    load_language_model,
    save_language_model,
)
from lit_align.masks import ParameterMask
from lit_align.modules.checkpointed import CHECKPOINT_KEY, PREFIX, read_checkpoint
from lit_align.pipelines.rows import Row, RowReader, write_json
from lit_align.pipelines.settings import DataKind
from lit_align.pipelines.training import inference_device
from lit_align.strict_json import check_form

Task: TypeAlias = Literal["multiple_choice", "exact_answer", "preference"]
TASK_KINDS: dict[Task, DataKind] = {
    "multiple_choice": "questions",
    "exact_answer": "questions",
    "preference": "preference",
}
TASK_FIELDS: dict[Task, tuple[str, ...]] = {
    "multiple_choice": ("choices", "answer_index"),
    "exact_answer": ("final_answer",),
    "preference": (),
}
TEXT_OR_NONE = (str, type(None))
CHECKPOINT = {  # what an export needs of one
    "hyper_parameters": {"model": str},
    CHECKPOINT_KEY: {"base_fingerprint": TEXT_OR_NONE, "mask_digest": TEXT_OR_NONE},
}


def evaluate_files(
    model: str,
    data: str,
    task: Task,
    delta: str | None = None,
    limit: int | None = None,
    output: str | None = None,
    mode: Literal["logps", "generate"] = "logps",
    max_new_tokens: int = 48,
    last_number: bool = False,
    batch_size: int = 64,
    chat_template: str | None = None,
    accelerator: str = "auto",
) -> None:
    """Accuracy of a model on a file of rows, with a 95 % interval.

    Args:
        model: local folder, hub id or alias.
        data: JSONL, JSON, Parquet or CSV file, `datasets` folder or hub id.
        task: `multiple_choice` (question, choices, answer_index), `exact_answer` (question,
            final_answer) or `preference` (prompt, chosen, rejected).
        delta: a delta to apply to the model first.
        limit: only the first so many rows.
        output: write the metrics and a record a row to this JSON file.
        mode: of `multiple_choice`: the likeliest choice, or the one a generated response names.
        max_new_tokens: of a generated response.
        last_number: take the last number where a response has no "The answer is:".
        batch_size: responses at a time.
        chat_template: in place of the tokenizer's own: `transcript` (Human/Assistant, for base
            models), a file's path, or the Jinja text.
        accelerator: the machine's (auto), or cpu.
    """
    language_model, tokenizer = load_language_model(model)
    if chat_template is not None:
        tokenizer.chat_template = chat_template_text(chat_template)
    language_model.to(inference_device(accelerator))  # type: ignore[arg-type]
    if delta is not None:
        apply_delta(language_model, delta)
    if limit is not None and limit < 1:
        raise DataError(f"the limit is {limit} rows: at least 1")
    metrics = evaluate(
        language_model,
        tokenizer,
        _evaluation_rows(data, task, tokenizer),
        task,
        limit=limit,
        mode=mode,
        max_new_tokens=max_new_tokens,
        last_number=last_number,
        batch_size=batch_size,
    )
    if output is not None:
        Path(output).parent.mkdir(parents=True, exist_ok=True)
        write_json(Path(output), metrics)
    print(json.dumps({k: v for k, v in metrics.items() if k != "records"}))


def _evaluation_rows(data: str, task: Task, tokenizer: PreTrainedTokenizerBase) -> list[Row]:
    """The rows of a file; preference pairs may have any format that training takes.

    Raises:
        DataError: bad rows, all named together.
    """
    reader = RowReader(TASK_KINDS[task], RowTokenizer(tokenizer, sys.maxsize), TASK_FIELDS[task])
    rows = reader.read(data)
    reader.bad_rows.raise_if_any(can_skip=False)
    return [row | {"chosen": row["target"]} for row in rows] if task == "preference" else rows


def export(
    output: str,
    model: str | None = None,
    delta: str | None = None,
    checkpoint: str | None = None,
    mask: str | None = None,
    adapter: str | None = None,
) -> None:
    """A trained model as a sparse delta (`.safetensors`), adapters, or an ordinary model folder.

    Either `--model` with `--delta` or `--adapter`, which are merged, or a checkpoint of `lit-align
    fit`, with the mask that it was trained on (none for a full fit, none for adapters).

    Args:
        output: a file ending in `.safetensors` (a delta) or a folder (a whole model; of a
            checkpoint of adapters a folder of peft's with these alone).
        model: the base; for a checkpoint, default the one it names.
        delta: a delta of that base.
        checkpoint: a Lightning checkpoint.
        mask: what the checkpoint was trained on.
        adapter: a folder of adapters of that base.

    Raises:
        TrainingError: the arguments do not go together.
    """
    if [checkpoint, delta, adapter].count(None) != 2:
        raise TrainingError("export takes --checkpoint, or --model with --delta or --adapter")
    if checkpoint is not None:
        trained, tokenizer = _from_checkpoint(checkpoint, model, mask)
    elif model is None:
        raise TrainingError("export --delta and --adapter need --model, the base")
    elif delta is not None:
        trained, tokenizer = load_language_model(model, dtype="auto")
        apply_delta(trained, delta)
    else:
        trained, tokenizer = load_language_model(model, dtype="auto")
        apply_adapters(trained, str(adapter))
    if has_adapters(trained):
        if output.endswith(".safetensors"):
            raise TrainingError("adapters are a folder: name one as --output")
        save_adapters(trained, output)
    elif output.endswith(".safetensors"):
        if mask is None:
            raise TrainingError("a delta needs --mask; name a folder to export the whole model")
        # A checkpoint's model knows what moved: its mask, and the delta that it started from.
        export_delta(trained, output, None if checkpoint else ParameterMask.load(mask))
    else:
        save_language_model(trained, tokenizer, output)
    print(output)


def _from_checkpoint(path: str, model: str | None, mask: str | None) -> tuple[Any, Any]:
    """The model of a checkpoint, its trained entries written into its weights."""
    checkpoint = read_checkpoint(path)
    if CHECKPOINT_KEY not in checkpoint:
        raise TrainingError(f"{path}: not a checkpoint of lit-align")
    try:
        check_form(checkpoint, CHECKPOINT)
        check_form(checkpoint["hyper_parameters"].get("delta"), TEXT_OR_NONE, "delta")
        check_form(checkpoint[CHECKPOINT_KEY].get("adapter"), (dict, type(None)), "adapter")
    except ValueError as error:
        raise TrainingError(f"{path}: not a checkpoint of lit-align: {error}") from error
    identity, state = checkpoint[CHECKPOINT_KEY], checkpoint["state_dict"]
    settings = checkpoint["hyper_parameters"]
    trained, tokenizer = load_language_model(model or settings["model"])
    if trained.base_fingerprint != identity["base_fingerprint"]:
        raise TrainingError(f"{path} was trained from another base than {model}")
    if settings.get("delta"):
        apply_delta(trained, settings["delta"])
    if mask is not None:
        restrict(trained, ParameterMask.load(mask), keep_base=False)
        digest = ParameterMask.load(mask).digest
        if digest != identity["mask_digest"]:
            raise TrainingError(f"{path} was trained on another mask than {mask}")
    elif identity["mask_digest"] not in (None, ParameterMask.full(trained).digest):
        raise TrainingError(f"{path} was trained on a mask: name it with --mask")
    elif identity.get("adapter") is not None:
        add_adapters(trained, _adapter_settings(path, checkpoint))
    state = {str(n).removeprefix(PREFIX): t for n, t in state.items()}
    load_trainable(trained, _without_masters(state, trained))
    return trained, tokenizer


def _without_masters(state: dict[str, Tensor], model: nn.Module) -> dict[str, Tensor]:
    """The state of a run in 16 bits, where masters of whole parameters stood beside them.

    In fp32 such parameters train themselves, under their own names and in their own shapes.
    """
    for name, parameter in trainable(model):
        module, _, own = name.rpartition(".")
        master = f"{module}.{trainable_name(own)}" if module else trainable_name(own)
        if name not in state and master in state and state[master].numel() == parameter.numel():
            state[name] = state.pop(master).view(parameter.shape)
    return state


def _adapter_settings(path: str, checkpoint: dict[str, Any]) -> AdapterSettings:
    """Those of a checkpoint's run, on the layers that they came to."""
    layers = {"layers": checkpoint[CHECKPOINT_KEY]["adapter"].get("layers"), "mask": None}
    given = checkpoint["hyper_parameters"].get("adapter")
    settings = AdapterSettings.of((given if isinstance(given, dict) else {}) | layers)
    assert settings is not None
    sizes = {size for tensor in checkpoint["state_dict"].values() for size in tensor.shape}
    if settings.start_rank not in sizes:  # else adapters of any size would be made
        raise TrainingError(f"{path} holds no adapters of rank {settings.start_rank}")
    try:
        check_form(settings.layers, [str])
    except ValueError as error:
        raise TrainingError(f"{path}: not a checkpoint of lit-align: layers: {error}") from error
    return settings
