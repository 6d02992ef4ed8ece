import json
import math

import pytest
import torch

from lit_align.compact.adapters import AdapterSettings
from lit_align.compact.change import read_change
from lit_align.errors import DataError, PipelineError
from lit_align.language_model import load_language_model, save_language_model
from lit_align.localizers import random_scores
from lit_align.masks import select
from lit_align.pipelines.settings import RunSettings, TrainSettings
from lit_align.pipelines.variants import (
    TuneData,
    Variant,
    data_module,
    train_variant,
    validation_loss,
)

TRAIN = TrainSettings(learning_rate=1e-2, batch_size=2, warmup_ratio=0.0)


@pytest.fixture
def data(tmp_path) -> TuneData:
    rows = [{"prompt": f"{i} + 1 =", "completion": f" {i + 1}."} for i in range(8)]
    path = tmp_path / "rows.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return TuneData((str(path),), validation_fraction=0.25, max_length=64)


def run(model, data, variant, folder, train=TRAIN, **options):
    folder.mkdir()
    return train_variant(str(model), data, variant, train, RunSettings(), folder, **options)


def test_a_mask_trains_its_entries_and_the_loss_falls(tiny_llama_dir, data, tmp_path):
    model, _ = load_language_model(tiny_llama_dir)
    mask = select(random_scores(model, 0), 0.1, base_fingerprint=model.base_fingerprint)
    (tmp_path / "base").mkdir()
    before = validation_loss(str(tiny_llama_dir), data, TRAIN, RunSettings(), tmp_path / "base")
    found = run(tiny_llama_dir, data, Variant("ten", mask), tmp_path / "run", keep="model")
    assert found["trained_parameters"] == mask.count()
    assert found["validation_loss"] < before["validation_loss"]
    assert (found["train_rows"], found["validation_rows"], found["steps"]) == (6, 2, 3)
    assert json.loads((tmp_path / "run" / "metrics.json").read_text()) == found
    trained, _ = load_language_model(tmp_path / "run" / "model")
    for name, weight in model.named_parameters():
        same = weight == dict(trained.named_parameters())[name]
        assert bool(same[~mask.dense(name)].all())


def test_an_adapter_trains_and_its_change_is_kept(tiny_llama_dir, data, tmp_path):
    variant = Variant("lora", adapter=AdapterSettings(rank=2, layers=["q_proj"], dropout=0.0))
    found = run(tiny_llama_dir, data, variant, tmp_path / "run", keep="change")
    assert found["trained_parameters"] == 2 * 2 * (32 + 32)  # q_proj is 32 × 32 in two blocks
    model, _ = load_language_model(tiny_llama_dir)
    change = read_change(tmp_path / "run" / "change", model)
    assert len(change.layers) == 2 and all(c.b.abs().max() > 0 for c in change.layers.values())


def test_the_validation_loss_is_that_of_the_last_step(tiny_llama_dir, data, tmp_path):
    """Where max_steps ends amid an epoch as well: the epoch's validation does not come then."""
    train = TrainSettings(learning_rate=1e-2, batch_size=2, warmup_ratio=0.0, max_steps=4, epochs=2)
    found = run(tiny_llama_dir, data, Variant("all"), tmp_path / "run", train, keep="model")
    again = TuneData(data.train_files, validation_fraction=0.25, max_length=64)
    (tmp_path / "again").mkdir()
    trained = str(tmp_path / "run" / "model")
    after = validation_loss(trained, again, TRAIN, RunSettings(), tmp_path / "again")
    assert math.isclose(found["validation_loss"], after["validation_loss"], rel_tol=1e-5)


def test_the_split_is_the_datas_and_the_order_the_runs(tiny_llama_dir, data, tmp_path):
    folders = [tmp_path / str(seed) for seed in range(2)]
    losses, held_out = [], []
    for seed, folder in enumerate(folders):
        folder.mkdir()
        machine = RunSettings(seed=seed)
        train_variant(str(tiny_llama_dir), data, Variant("all"), TRAIN, machine, folder)
        losses.append((folder / "logs" / "metrics.csv").read_text())
        rows = data_module(data, str(tiny_llama_dir), TRAIN, machine, folder).rows("validation")
        held_out.append([row.sequences[0].prompt_ids.tolist() for row in rows])
    assert losses[0] != losses[1]
    assert held_out[0] == held_out[1]
    torch.manual_seed(0)


def test_no_files_are_an_error(tiny_llama_dir, tmp_path):
    with pytest.raises(PipelineError, match="train_files is empty"):
        run(tiny_llama_dir, TuneData(), Variant("all"), tmp_path / "run")


def test_rows_of_messages_take_the_template_that_is_given(tiny_llama_dir, tmp_path):
    """As base models need it, which have none of their own."""
    folder = tmp_path / "base"
    model, tokenizer = load_language_model(tiny_llama_dir)
    tokenizer.chat_template = None
    save_language_model(model, tokenizer, folder)
    turns = [{"role": "user", "content": "2 + 1 ="}, {"role": "assistant", "content": " 3."}]
    path = tmp_path / "rows.jsonl"
    path.write_text(json.dumps({"messages": turns}) + "\n")
    given = TuneData((str(path),), validation_fraction=0.0, chat_template="transcript")
    rows = data_module(given, str(folder), TRAIN, RunSettings(), tmp_path).rows("train")
    assert "Human: 2 + 1 =" in tokenizer.decode(rows[0].sequences[0].prompt_ids)
    without = TuneData((str(path),), validation_fraction=0.0)
    with pytest.raises(DataError, match="chat_template"):
        data_module(without, str(folder), TRAIN, RunSettings(), tmp_path)
