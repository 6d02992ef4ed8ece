"""The command line: Lightning's verbs, then the pipelines'."""

from __future__ import annotations

import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import lightning
import torch
from jsonargparse import auto_cli
from lightning.pytorch.callbacks import Callback, Checkpoint
from lightning.pytorch.cli import LightningArgumentParser, LightningCLI
from lightning.pytorch.loggers import CSVLogger, Logger, TensorBoardLogger
from lightning.pytorch.utilities.exceptions import MisconfigurationException, SIGTERMException

from lit_align.callbacks import Checkpointing, LogpsWriter
from lit_align.callbacks.checkpointing import SIGTERM_STATUS
from lit_align.callbacks.folder_lock import FolderLock
from lit_align.checkpoint_file import choose_sound
from lit_align.errors import LitAlignError
from lit_align.files import write_failure
from lit_align.modules import LanguageModelModule
from lit_align.modules.checkpointed import read_checkpoint
from lit_align.pipelines.allo import allo
from lit_align.pipelines.alps import alps
from lit_align.pipelines.bench import bench_command
from lit_align.pipelines.commands import evaluate_files, export
from lit_align.pipelines.generation import generate_answers
from lit_align.pipelines.ila import ila
from lit_align.pipelines.localize import localize
from lit_align.pipelines.plan import plan
from lit_align.pipelines.token_auc import token_weight_auc
from lit_align.pipelines.workbench.command import mask_command

NO_MEMORY = "DefaultCPUAllocator: can't allocate memory"  # of torch, in a RuntimeError
CHECKPOINT_WORDS = ("best", "last", "hpc", "registry")  # Lightning finds the file itself
TRAINER_VERBS = ("fit", "validate", "test", "predict")
VERBS: dict[str, Callable[..., Any]] = {
    "allo": allo,
    "ila": ila,
    "alps": alps,
    "localize": localize,
    "generate": generate_answers,
    "evaluate": evaluate_files,
    "token-auc": token_weight_auc,
    "export": export,
    "plan": plan,
}
# Lists, flags and verbs of their own, which auto_cli does not take: these parse their words.
COMMANDS: dict[str, Callable[[Sequence[str]], None]] = {
    "mask": mask_command,
    "bench": bench_command,
}
USAGE = """usage: lit-align VERB [options]     (lit-align VERB --help lists them)

  fit         train a module: --config configs/masked_dpo.yaml, or options
  validate    its validation metrics
  test        the same on the test split
  predict     log-probs of every response
  allo        the whole ALLO pipeline: sample, warm up, locate, forget, improve, evaluate, export
  ila         rank the linear layers by what fine-tuning makes of them, train the important ones
  alps        find the attention heads that a task moves, train only those of all heads
  localize    a mask of key parameters: from two model folders, scores, at random, by magnitude
  mask        show, compare, combine, plot and convert masks
  generate    answers to questions, in AlpacaEval's or MT-Bench's format
  evaluate    accuracy of a model on a file: multiple_choice, exact_answer or preference
  token-auc   how well token weights find the words that people marked as wrong
  export      a checkpoint as a sparse delta, an adapter or a Hugging Face folder
  plan        the memory of a training step by part, before anything is loaded
  bench       time the kernels on this device, --audit them without one, or time DPO beside
              TRL, peft and torch: bench [kernel ...], bench training
"""


class AlignCLI(LightningCLI):
    """LightningCLI whose data module takes the model's tokenizer."""

    def add_arguments_to_parser(self, parser: LightningArgumentParser) -> None:
        """Link the tokenizer to the model."""
        parser.link_arguments("model.init_args.model", "data.init_args.tokenizer")

    def _parse_ckpt_path(self) -> None:
        """Look at the checkpoint, and take no settings from it, as Lightning would.

        They name a model and may ask for the code that it brings: whoever starts a command does.
        """
        path = self.config[self.config.subcommand].get("ckpt_path")
        if path and path not in CHECKPOINT_WORDS:
            chosen = choose_sound(Path(path))
            if not chosen.is_dir():  # (of shards)
                read_checkpoint(chosen)

    def instantiate_trainer(self, **kwargs: Any) -> lightning.Trainer:
        """A Trainer with CSV and TensorBoard loggers by default."""
        root = self._get(self.config_init, "trainer.default_root_dir") or "runs"
        kwargs.setdefault("default_root_dir", root)
        if self._get(self.config_init, "trainer.logger") in (None, True):
            kwargs.setdefault("logger", default_loggers(root))
        configured = self._get(self.config_init, "trainer.callbacks") or []
        wanted = self._get(self.config_init, "trainer.enable_checkpointing") is not False
        if wanted and not any(isinstance(c, Checkpoint) for c in configured):
            kwargs.setdefault("callbacks", [*configured, Checkpointing()])
        elif not any(isinstance(c, Checkpointing) for c in configured):
            kwargs.setdefault("callbacks", [*configured, FolderLock()])
        trainer = super().instantiate_trainer(**kwargs)
        if self.subcommand == "predict":
            callbacks: list[Callback] = trainer.callbacks  # type: ignore[attr-defined]
            if not any(isinstance(c, LogpsWriter) for c in callbacks):
                callbacks.append(LogpsWriter())
        return trainer


def default_loggers(root: str | Path) -> list[Logger]:
    """CSV and TensorBoard, under `root`, in one version folder."""
    csv = CSVLogger(root, name="logs")
    return [csv, TensorBoardLogger(root, name="logs", version=csv.version)]


def main(arguments: Sequence[str] | None = None) -> None:
    """Run one verb; errors about the input end with their message alone and exit code 1."""
    words = list(sys.argv[1:] if arguments is None else arguments)
    verb = words[0] if words else "--help"
    if verb in ("-h", "--help"):
        print(USAGE, end="")
        return
    if verb not in (*TRAINER_VERBS, *VERBS, *COMMANDS):
        print(f"lit-align: unknown verb {verb!r}\n{USAGE}", end="", file=sys.stderr)
        raise SystemExit(2)
    try:
        if verb in TRAINER_VERBS:
            train(arguments)
        elif verb in COMMANDS:
            COMMANDS[verb](words[1:])
        else:
            auto_cli(VERBS[verb], args=words[1:], prog=f"lit-align {verb}", as_positional=False)
    except SIGTERMException as ended:  # without Checkpointing Lightning would say that all is done
        ended.code = SIGTERM_STATUS
        raise
    except Exception as error:
        if (said := said_of(error)) is None:
            raise  # a defect of ours: its traceback is wanted
        print(f"lit-align: {said}", file=sys.stderr)
        raise SystemExit(1) from error


def said_of(error: Exception) -> str | None:
    """The message of an error about the input or the machine; None: it is another."""
    cause: BaseException = error
    # jsonargparse wraps what the constructors of a config's classes raise, nested ones twice.
    while isinstance(cause, ValueError) and cause.__cause__ is not None:
        cause = cause.__cause__
    if isinstance(cause, LitAlignError | MisconfigurationException):
        return str(cause)
    if (failure := write_failure(cause)) is not None:
        return (
            f"a file could not be written ({failure}); checkpoints and stages that were done are "
            "as they were: make room, or choose another folder, and start again"
        )
    if isinstance(cause, MemoryError | torch.OutOfMemoryError) or NO_MEMORY in str(cause):
        what = str(cause).partition("\n")[0]
        return f"the memory does not suffice ({what}): take shorter rows or smaller batches"
    return str(cause) if isinstance(cause, OSError) else None


def train(arguments: Sequence[str] | None) -> None:
    """A verb of the Trainer, as LightningCLI knows it; None: the words of the command line."""
    AlignCLI(
        LanguageModelModule,
        lightning.LightningDataModule,
        subclass_mode_model=True,
        subclass_mode_data=True,
        save_config_kwargs={"overwrite": True},
        seed_everything_default=0,
        auto_configure_optimizers=False,  # the modules do: theirs follows the mask
        args=None if arguments is None else list(arguments),
        parser_kwargs={"prog": "lit-align"},
    )


if __name__ == "__main__":
    main()
