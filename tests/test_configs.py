"""Every file of configs/ runs: on a tiny model, with what is small about it said here."""

import json
import re
import sys
from pathlib import Path

import pytest

from lit_align.cli import main
from lit_align.data import UnlearningDataModule
from lit_align.gguf_alias import ALIAS, cache_dir
from lit_align.pipelines.rewards.rewriting import REWRITING_PROMPT

pytestmark = pytest.mark.usefixtures("_unrendered")
CONFIGS = Path(__file__).resolve().parents[1] / "configs"
IDS = ["--data.init_args.train_file", "configs/data/unlearning_ids.jsonl"]
FIT: dict[str, list[str]] = {
    "masked_dpo.yaml": [],
    "masked_dpo_tiny.yaml": [],
    "npo.yaml": IDS,  # its own rows have one weight a token of the default model's tokenizer
    "npo_tiny.yaml": [],
    "sft.yaml": [],
    "sft_lora.yaml": [],
    "sft_tiny.yaml": [],
    "reward_model.yaml": [],
    "reward_model_tiny.yaml": [],
}
ALLO: dict[str, list[str]] = {
    "allo.yaml": [],
    "allo_qa.yaml": ["--data.train_files", '["configs/data/choices.jsonl"]'],
    "allo_tiny.yaml": [],
    "demo.yaml": [],
}
ILA = ["ila.yaml", "ila_tiny.yaml"]
SMALL_ILA = {
    "run.accelerator": "cpu", "stage2.batches": 2, "stage1.epochs": 1, "stage1.batch_size": 4,
    "stage2.batch_size": 4, "use.batch_size": 4, "use.epochs": 1, "use.baselines": "[]",
    "use.top": "[0.3]", "data.validation_fraction": 0.2,
}  # fmt: skip
ALPS = ["alps.yaml", "alps_tiny.yaml"]
SMALL_ALPS = {
    "run.accelerator": "cpu", "train.epochs": 1, "train.batch_size": 4, "train.learning_rate": 1e-3,
    "compare.baselines": "[random, lora]", "compare.lora.rank": 2, "data.validation_fraction": 0.2,
}  # fmt: skip
SMALL = {
    "data.train_rows": 5, "data.held_out_rows": 2, "run.accelerator": "cpu",
    "sft.max_steps": 1, "sample.num_samples": 3, "sample.max_new_tokens": 8,
    "warm_up.max_steps": 1, "token_rewards.max_steps": 1, "forget.max_steps": 1,
    "improve.max_steps": 1, "warm_up.learning_rate": 1e-3, "evaluate.max_new_tokens": 8,
}  # fmt: skip


@pytest.fixture
def workplace(tmp_path, monkeypatch) -> Path:
    """A folder that has the configs, and takes what the runs write."""
    (tmp_path / "configs").symlink_to(CONFIGS)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "argv", ["lit-align"])  # LightningCLI warns of pytest's words
    return tmp_path


def test_every_config_is_run_here():
    elsewhere = {"masked_dpo_fsdp.yaml"}  # on two processes: tests/modules/test_sharded.py
    assert {p.name for p in CONFIGS.glob("*.yaml")} == {*FIT, *ALLO, *ILA, *ALPS} | elsewhere


@pytest.mark.parametrize("name", FIT)
def test_fit(name, workplace, tiny_llama_dir):
    options = ["--model.init_args.model", str(tiny_llama_dir), "--trainer.accelerator", "cpu"]
    options += ["--trainer.fast_dev_run", "true", *FIT[name]]
    main(["fit", "--config", f"configs/{name}", *options])
    written = [path.name for path in workplace.rglob("mask.safetensors")]
    text = (CONFIGS / name).read_text("utf-8")
    assert bool(written) == bool(re.search("^    - class_path: .*KeyParameter", text, re.M))


@pytest.mark.parametrize("name", ALLO)
def test_allo(name, workplace, tiny_llama_dir):
    options = [f"--{setting}={value}" for setting, value in SMALL.items()] + ALLO[name]
    options += ["--model", str(tiny_llama_dir), "--output", "run"]
    main(["allo", "--config", f"configs/{name}", *options])
    assert set(json.loads(Path("run/results.json").read_text("utf-8"))) >= {"base", "dpo", "allo"}


@pytest.mark.parametrize("name", ILA)
def test_ila(name, workplace, tiny_llama_dir):
    options = [f"--{setting}={value}" for setting, value in SMALL_ILA.items()]
    options += ["--model", str(tiny_llama_dir), "--output", "run"]
    main(["ila", "--config", f"configs/{name}", *options])
    found = json.loads(Path("run/results.json").read_text("utf-8"))["variants"]
    assert set(found) == {"top_30", "freeze_25"}


@pytest.mark.parametrize("name", ALPS)
def test_alps(name, workplace, tiny_llama_dir):
    options = [f"--{setting}={value}" for setting, value in SMALL_ALPS.items()]
    options += ["--model", str(tiny_llama_dir), "--output", "run"]
    main(["alps", "--config", f"configs/{name}", *options])
    found = json.loads(Path("run/results.json").read_text("utf-8"))["variants"]
    assert set(found) == {"alps", "random", "lora"}


def test_commented_ways_of_the_callback_work(workplace, tiny_llama_dir):
    """The alternatives of masked_dpo.yaml: the weight change of a full fit, then its mask."""
    text = (CONFIGS / "masked_dpo.yaml").read_text("utf-8")
    active = re.search(r"    - class_path: .*\n(?:      .*\n)+", text)
    from_file, weight_change = re.findall(r"    # - class_path: .*\n(?:    #   .*\n)+", text)
    assert active and "weight_change" in weight_change and "mask:" in from_file
    options = ["--model.init_args.model", str(tiny_llama_dir), "--trainer.accelerator", "cpu"]
    options += ["--model.init_args.learning_rate", "1e-3", "--trainer.max_steps", "1"]
    for way in (weight_change, from_file):
        Path("way.yaml").write_text(text.replace(active[0], way.replace("    # ", "    ")))
        main(["fit", "--config", "way.yaml", *options])
        assert Path("runs/masked_dpo/mask.safetensors").is_file()


def test_rewriting_rows_have_the_form_of_the_rewriting_task():
    parts = [re.escape(p) for p in re.split(r"\{\w+\}", REWRITING_PROMPT)]
    form = re.compile("(?s:.+)".join(parts))
    lines = (CONFIGS / "data" / "rewriting.jsonl").read_text("utf-8").splitlines()
    assert lines and all(form.fullmatch(json.loads(x)["prompt"][0]["content"]) for x in lines)


def test_token_weights_of_ids_have_one_weight_a_token(tiny_llama_dir):
    assert_weights_differ_within_responses("unlearning_ids.jsonl", str(tiny_llama_dir))


def test_token_weights_of_text_fit_the_default_model():
    if not list(cache_dir().glob(f"{ALIAS}-*")):
        pytest.skip("the default model is not in the cache")
    assert_weights_differ_within_responses("unlearning.jsonl", ALIAS)


def assert_weights_differ_within_responses(name: str, model: str) -> None:
    data = UnlearningDataModule(model, str(CONFIGS / "data" / name))
    data.setup("fit")
    weights = [row.sequences[0].token_weights for row in data.train_rows]
    assert any((w == 0).any() and (w != 0).any() for w in weights)
