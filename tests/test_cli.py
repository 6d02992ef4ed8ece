"""The command line: every verb, from fit to export, its options, and how it ends on bad input."""

import json
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from lit_align.cli import COMMANDS, VERBS, main, said_of
from lit_align.masks import ParameterMask

CONFIGS = Path(__file__).resolve().parents[1] / "configs"
DPO = ["--config", "configs/masked_dpo_tiny.yaml", "--trainer.enable_progress_bar", "false"]
PAIRS = "configs/data/preference.jsonl"


def words(text: str) -> set[str]:
    return set(text.split())


TRAIN = "learning_rate epochs batch_size accumulate weight_decay warmup_ratio lr_scheduler "
TRAIN += "min_lr_ratio gradient_clip max_length layout max_tokens max_steps betas eps"
DPO_LOSS = "beta loss_type label_smoothing"
ALLO_GROUPS = {
    "data": "kind train_files held_out_files train_rows held_out_rows held_out_every seed "
    "on_bad_row",
    "sft": f"{TRAIN} enabled",
    "sample": "num_samples temperature top_p max_new_tokens pairs_per_prompt wrong_per_prompt "
    "gold_as_chosen batch_size seed",
    "warm_up": f"{TRAIN} {DPO_LOSS}",
    "locate": "method forget_ratio improve_ratio granularity scope num_batches seed",
    "token_rewards": f"{TRAIN} kind threshold teacher teacher_model teacher_url "
    "teacher_key_variable teacher_timeout_seconds teacher_max_retries teacher_concurrency "
    "teacher_max_new_tokens teacher_temperature teacher_num_samples reward_model identity_rewrites",
    "forget": f"{TRAIN} enabled beta loss_type retain retain_weight",
    "improve": f"{TRAIN} {DPO_LOSS} filter_side drop_fraction keep_fraction",
    "evaluate": "mode max_new_tokens last_number batch_size",
    "run": "precision accelerator gradient_checkpointing seed",
}
TUNE_DATA = "train_files validation_files validation_fraction max_rows max_length objective "
TUNE_DATA += "chat_template seed"
ADAPTER = "kind rank alpha dropout layers mask quantization initial_rank rank_warmup rank_final "
ADAPTER += "rank_interval orthogonality"
ILA_GROUPS = {
    "data": f"{TUNE_DATA} search_files",
    "stage1": f"{TRAIN} full_learning_rate enabled method until epsilon window milestones change "
    "adapter",
    "stage1.adapter": ADAPTER,
    "stage2": "milestones initial_score batches batch_size optimizer learning_rate budget "
    "budget_weight",
    "use": f"{TRAIN} full_learning_rate method top freeze baselines baseline_freeze seeds scores "
    "transfer compare_share adapter",
    "use.adapter": ADAPTER,
    "run": ALLO_GROUPS["run"],
}
ALPS_GROUPS = {
    "data": TUNE_DATA,
    "locate": "representation metric tau rounding others o_proj ratio",
    "train": TRAIN,
    "compare": "baselines seeds lora_learning_rate keep lora",
    "compare.lora": ADAPTER,
    "run": ALLO_GROUPS["run"],
}
AUC_GROUPS = {
    "rows": "train train_rows identity_rows test_rows threshold batch_size bootstrap seed",
    "train": TRAIN,
    "run": ALLO_GROUPS["run"],
}


def grouped(single: str, groups: dict[str, str]) -> set[str]:
    """Options of a verb that takes settings in groups; the groups themselves take a file each."""
    return words(single) | set(groups) | {f"{g}.{n}" for g in groups for n in words(groups[g])}


OPTIONS = {
    "allo": grouped("output model merge_model", ALLO_GROUPS),
    "ila": grouped("output model", ILA_GROUPS),
    "alps": grouped("output model task_model heads", ALPS_GROUPS),
    "plan": words(
        "model method mask ratio adapter rank batch_size prompt_tokens response_tokens max_tokens "
        "layout precision masters gradient_checkpointing reference strategy devices device as_json"
    ),
    "token-auc": grouped("data output model chat_template", AUC_GROUPS),
    "localize": words(
        "model output method trained ratio granularity scope scores lowest heads heads.help seed"
    ),
    "generate": words(
        "model data output format name delta adapter chat_template limit max_new_tokens "
        "temperature top_p num_choices stop batch_size seed accelerator"
    ),
    "mask show": words("model parameters"),
    "mask compare": words("model level share across-bases output"),
    "mask combine": words("model output linear"),
    "mask plot": words("model output kind ratio"),
    "mask convert": words("model output"),
    "bench": words("size output audit document"),
    "evaluate": words(
        "model data task delta limit output mode max_new_tokens last_number batch_size "
        "chat_template accelerator"
    ),
    "export": words("output model delta checkpoint mask adapter"),
}
MODULE_OPTIONS = words(
    "model delta learning_rate weight_decay betas eps lr_scheduler warmup_ratio reference "
    "gradient_checkpointing attn_implementation trust_remote_code reference_cache "
    "stochastic_rounding adapter adapter.help min_lr_ratio"
)
MODULES = {
    "SupervisedFineTuning": set(),
    "MaskedDPO": words(f"{DPO_LOSS} filter_side filter_drop_fraction filter_keep_fraction"),
    "TokenWeightedNPO": words("beta loss_type retain retain_weight"),
    "ILAMaskLearning": words(
        "change loss beta initial_score budget budget_weight optimizer scores"
    ),
}
DATA_OPTIONS = words(
    "train_file validation_file test_file predict_file format chat_template max_length truncation "
    "batch_size eval_batch_size max_rows validation_fraction on_bad_row output_dir num_workers "
    "seed group_by_length streaming shuffle_buffer layout max_tokens"
)
MASK = "runs/masked_dpo_tiny/mask.safetensors"


@pytest.fixture(scope="module")
def workplace(tmp_path_factory) -> Path:
    """A folder that has the configs, and takes what the verbs write."""
    folder = tmp_path_factory.mktemp("cli")
    (folder / "configs").symlink_to(CONFIGS)
    return folder


@pytest.fixture(autouse=True)
def _at_workplace(workplace, monkeypatch):
    monkeypatch.chdir(workplace)
    monkeypatch.setattr(sys, "argv", ["lit-align"])  # LightningCLI warns of pytest's words


@pytest.fixture(scope="module")
def model(tiny_llama_dir) -> list[str]:
    return ["--model.init_args.model", str(tiny_llama_dir)]


@pytest.fixture(scope="module")
def fitted(workplace, model) -> Path:
    """The checkpoint of a run of masked DPO; its mask is runs/masked_dpo_tiny/mask.safetensors."""
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(workplace)
        patch.setattr(sys, "argv", ["lit-align"])
        main(["fit", *DPO, *model])
    kept = (workplace / "runs" / "masked_dpo_tiny" / "checkpoints").glob("*.ckpt")
    return max(kept, key=lambda p: p.stat().st_mtime)


def fails(capsys, *words: str, code: int = 1) -> str:
    """The message of a command that must fail, without a traceback."""
    with pytest.raises(SystemExit) as end:
        main([str(word) for word in words])
    assert end.value.code == code
    said = capsys.readouterr().err
    assert "Traceback" not in said
    return said


def help_of(capsys, *words: str) -> str:
    with pytest.raises(SystemExit) as end:
        main(list(words))
    assert end.value.code == 0
    return capsys.readouterr().out


# ---- help and options ----------------------------------------------------------------------


def test_without_a_verb_the_verbs_are_listed(capsys):
    for words in ([], ["--help"], ["-h"]):
        main(words)
        said = capsys.readouterr().out
        assert all(f"\n  {verb} " in said for verb in ("fit", "predict", *VERBS, *COMMANDS))


def test_unknown_verb(capsys):
    said = fails(capsys, "trian", code=2)
    assert "unknown verb 'trian'" in said and "localize" in said


@pytest.mark.parametrize("verb", OPTIONS)
def test_options_of_a_verb_are_frozen(verb, capsys):
    """What people's scripts call: rename or drop an option on purpose, or not at all."""
    found = set(re.findall(r"^  --([\w.-]+)", help_of(capsys, *verb.split(), "--help"), re.M))
    assert found - {"config", "print_config", "help"} == OPTIONS[verb]


@pytest.mark.parametrize("verb", ["fit", "validate", "test", "predict"])
def test_help_of_the_trainers_verbs(verb, capsys):
    said = help_of(capsys, verb, "--help")
    assert {"--trainer.precision", "--ckpt_path", "--print_config"} <= set(said.split())
    assert "--optimizer" not in said


@pytest.mark.parametrize("name", MODULES)
def test_options_of_a_module_are_frozen(name, capsys):
    said = help_of(capsys, "fit", f"--model.help={name}")
    found = set(re.findall(r"^  --model\.(?:init_args\.)?([\w.]+)", said, re.M))
    assert found == MODULE_OPTIONS | MODULES[name]


@pytest.mark.parametrize("name", ["PreferenceDataModule", "SFTDataModule", "UnlearningDataModule"])
def test_options_of_a_data_module_are_frozen(name, capsys):
    said = help_of(capsys, "fit", f"--data.help=lit_align.data.{name}")
    found = set(re.findall(r"^  --data\.(?:init_args\.)?([\w.]+)", said, re.M))
    assert found - {"tokenizer", "tokenizer.help"} == DATA_OPTIONS | (
        {"train_on"} if "SFT" in name else set()
    )


def test_print_config(capsys, model):
    said = help_of(capsys, "fit", *DPO, *model, "--model.beta", "0.3", "--print_config")
    assert "beta: 0.3" in said and "class_path: lit_align.modules.MaskedDPO" in said
    said = help_of(capsys, "allo", "--config", "configs/allo_tiny.yaml", "--print_config")
    assert "train_rows: 12" in said and "gold_as_chosen: true" in said


# ---- fit, validate, test, predict ----------------------------------------------------------


def test_fit_logs_to_csv_and_tensorboard(fitted, workplace):
    version = workplace / "runs" / "masked_dpo_tiny" / "logs" / "version_0"
    header = (version / "metrics.csv").read_text("utf-8").splitlines()[0].split(",")
    assert {"loss", "rewards/margins", "eval_loss", "mask/density"} <= set(header)
    assert list(version.glob("events.out.tfevents*"))


def test_fit_goes_on_from_its_checkpoint(fitted, model, tmp_path):
    before = ParameterMask.load(MASK).digest
    ckpt = ["--ckpt_path", str(fitted), "--trainer.max_epochs", "3"]
    main(["fit", *DPO, *model, *ckpt])
    assert ParameterMask.load(MASK).digest == before
    newest = max(Path("runs/masked_dpo_tiny").rglob("*.ckpt"), key=lambda p: p.stat().st_mtime)
    assert torch.load(newest, weights_only=True)["epoch"] == 2


def test_validate_and_test_a_checkpoint(fitted, model, capsys):
    main(["validate", *DPO, *model, "--ckpt_path", str(fitted)])
    assert "eval_rewards/accuracies" in capsys.readouterr().out
    rows = ["--data.init_args.test_file", PAIRS]
    main(["test", *DPO, *model, *rows, "--ckpt_path", str(fitted)])
    said = capsys.readouterr().out
    margin = re.search(r"test_rewards/margins\D+(-?[\d.]+)", said)
    assert margin and float(margin[1]) > 0  # what it was trained on


def test_predict_writes_log_probs(fitted, model):
    rows = ["--data.init_args.predict_file", PAIRS]
    main(["predict", *DPO, *model, *rows, "--ckpt_path", str(fitted)])
    lines = Path("runs/masked_dpo_tiny/logps.jsonl").read_text("utf-8").splitlines()
    records = [json.loads(line) for line in lines]
    assert [(r["row_id"], r["role"]) for r in records] == [
        (row, role) for row in range(10) for role in ("chosen", "rejected")
    ]
    assert any(r["logp"] != r["ref_logp"] for r in records)


def test_a_module_by_options_alone(tiny_llama_dir):
    """Without a config: short class names, and a callback of one's own choice."""
    main(
        f"fit --model MaskedDPO --model.model {tiny_llama_dir} --data PreferenceDataModule "
        f"--data.train_file {PAIRS} --data.max_length 128 --trainer.max_steps 1 "
        "--trainer.callbacks+=KeyParameterLocalization --trainer.callbacks.method random "
        "--trainer.default_root_dir runs/options --trainer.accelerator cpu".split()
    )
    assert ParameterMask.load("runs/options/mask.safetensors").metadata.method == "random"


# ---- export, evaluate, localize ------------------------------------------------------------


def test_export_as_delta_and_as_folder_agree(fitted, tiny_llama_dir):
    checkpoint = ["--checkpoint", str(fitted), "--mask", MASK]
    main(["export", "--output", "new/delta.safetensors", *checkpoint])
    main(["export", "--output", "new/folder", *checkpoint])
    delta = ["--model", str(tiny_llama_dir), "--delta", "new/delta.safetensors"]
    main(["export", "--output", "new/merged", *delta])
    folder, merged = (load_file(f"new/{n}/model.safetensors") for n in ("folder", "merged"))
    base = load_file(tiny_llama_dir / "model.safetensors")
    assert folder.keys() == merged.keys() == base.keys()
    assert all(torch.equal(folder[name], merged[name]) for name in base)
    assert any(not torch.equal(folder[name], base[name]) for name in base)


def test_evaluate(fitted, tiny_llama_dir, capsys):
    main(["export", "--output", "d.safetensors", "--checkpoint", str(fitted), "--mask", MASK])
    start = ["evaluate", "--model", str(tiny_llama_dir), "--delta", "d.safetensors"]
    capsys.readouterr()
    choices = ["--data", "configs/data/choices.jsonl", "--task", "multiple_choice"]
    main([*start, *choices, "--limit", "3", "--output", "deep/er/metrics.json"])
    said = json.loads(capsys.readouterr().out)
    written = json.loads(Path("deep/er/metrics.json").read_text("utf-8"))
    assert said["n"] == 3 and len(written.pop("records")) == 3 and written == said
    numbers = ["--data", "configs/data/numbers.jsonl", "--task", "exact_answer"]
    main([*start, *numbers, "--max_new_tokens", "4"])
    assert json.loads(capsys.readouterr().out)["n"] == 8


def test_evaluate_preference_takes_every_format_of_pairs(tiny_llama_dir, capsys):
    main(["evaluate", "--model", str(tiny_llama_dir), "--data", PAIRS, "--task", "preference"])
    assert json.loads(capsys.readouterr().out)["n"] == 10


def test_localize_finds_what_training_moved(fitted, tiny_llama_dir):
    main(["export", "--output", "moved", "--checkpoint", str(fitted), "--mask", MASK])
    start = ["localize", "--model", str(tiny_llama_dir)]
    main([*start, "--trained", "moved", "--ratio", "0.05", "--output", "m/found.safetensors"])
    found, mask = ParameterMask.load("m/found.safetensors"), ParameterMask.load(MASK)
    assert found.density() == pytest.approx(0.05, abs=1e-3)
    assert (found & mask).digest == found.digest
    for method in ("random", "magnitude"):
        main([*start, "--method", method, "--granularity", "row", "--output", "m/o.safetensors"])
        assert ParameterMask.load("m/o.safetensors").metadata.method == method


# ---- bad input -----------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ("fit {dpo} --data.init_args.train_file absent.jsonl", "absent.jsonl: no such file"),
        ("fit {dpo} --model.init_args.model ./absent", "absent: no such folder"),
        ("fit {dpo} --trainer.callbacks.mask m.safetensors", "either mask or method"),
        (
            "fit --config configs/sft_lora.yaml --model.init_args.adapter.rank 0",
            "adapter: rank is 0",  # of a class inside a class
        ),
        ("test {dpo}", "no test rows: give test_file"),
        ("predict {dpo}", "no predict rows"),
        ("export --output d.safetensors", "takes --checkpoint, or --model with"),
        ("export --output x --checkpoint {ckpt}", "name it with --mask"),
        ("export --output x --checkpoint absent", "not a checkpoint, or damaged"),
        (
            "export --output x --checkpoint configs/sft.yaml",
            "sft.yaml: not a checkpoint, or damaged",
        ),
        ("fit {dpo} --ckpt_path configs/sft.yaml", "sft.yaml: not a checkpoint, or damaged"),
        ("fit {dpo} --ckpt_path {model}/model.safetensors", "not a checkpoint, or damaged"),
        ("fit {dpo} --trainer.devices 0", "devices"),
        ("fit {dpo} --model.init_args.lr_scheduler x", "choose one of linear"),
        ("export --output x --checkpoint {ckpt} --mask configs/sft.yaml", "read as a mask"),
        ("export --output x --delta absent", "need --model"),
        ("export --output x --model {model} --delta configs/sft.yaml", "not a delta"),
        ("evaluate --model {model} --data absent --task preference", "no such file or folder"),
        ("evaluate --model {model} --data {numbers} --task multiple_choice", "lacks choices"),
        ("evaluate --model {model} --data {numbers} --task exact_answer --limit 0", "limit"),
        ("evaluate --model {model} --data {numbers} --task exact_answer --batch_size 0", "batch"),
        ("evaluate --model configs --data {numbers} --task exact_answer", "tokenizer"),
        ("localize --model {model} --output x.safetensors", "needs --trained"),
        ("localize --model {model} --trained {model} --output x.safetensors", "above zero"),
        ("localize --model {model} --method random --ratio 2 --output x.safetensors", "(0, 1]"),
        ("localize --model {model} --method random --output /proc/no/x.safetensors", "/proc/no"),
        ("allo --model ./absent --output run", "absent: no such folder"),
        ("allo --model {model} --output run --data.kind questions", "needs data.train_files"),
        ("allo --model {model} --output run --locate.forget_ratio 2", "(0, 1]"),
    ],
)
def test_bad_input_ends_with_its_message(words, message, capsys, fitted, model, tiny_llama_dir):
    blanks = {
        "dpo": " ".join([*DPO, *model]),
        "ckpt": str(fitted),
        "model": str(tiny_llama_dir),
        "numbers": "configs/data/numbers.jsonl",
    }
    said = fails(capsys, *words.format(**blanks).split())
    assert message in said.split("lit-align: ", 1)[1]


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ("fit --config absent.yaml", "absent.yaml"),
        ("fit --nonsense 3 --config configs/sft_tiny.yaml", "nonsense"),
        ("localize --model m --output o --granularity atom", "granularity"),
        ("allo --locate.method guess", "locate.method"),
        ("evaluate --model m", "required"),
    ],
)
def test_wrong_options_end_with_usage(words, message, capsys):
    assert message in fails(capsys, *words.split(), code=2)


def test_too_little_memory_ends_with_a_message_and_our_own_defects_with_a_traceback():
    with pytest.raises(RuntimeError) as caught:
        torch.empty(2**60, dtype=torch.uint8)
    for error in (caught.value, MemoryError(), torch.OutOfMemoryError("CUDA out of memory")):
        assert "the memory does not suffice" in (said_of(error) or "")
    assert said_of(RuntimeError("a defect")) is None


def test_bad_rows_are_counted_and_nothing_is_trained(model, capsys):
    Path("bad.jsonl").write_text('{"prompt": "a", "chosen": "b", "rejected": "b"}\nnot json\n')
    said = fails(capsys, "fit", *DPO, *model, "--data.init_args.train_file", "bad.jsonl")
    assert "1 x chosen and rejected are identical" in said
    assert "bad.jsonl:2: not JSON" in said


def test_a_process_of_its_own(workplace):
    """The console script: what it prints, and no traceback at its end."""
    script = Path(sys.executable).parent / "lit-align"
    words = [str(script), "fit", "--config", "configs/sft_tiny.yaml"]
    words += ["--model.init_args.model", "./absent"]
    done = subprocess.run(words, cwd=workplace, capture_output=True, text=True)
    assert done.returncode == 1
    assert done.stderr.splitlines()[-1] == "lit-align: ./absent: no such folder"
    assert "Traceback" not in done.stderr and "args parameter" not in done.stderr
