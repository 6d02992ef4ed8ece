import itertools
import json
import logging

import lightning
import numpy as np
import pytest
import torch

from lit_align.data import (
    CHOSEN,
    REJECTED,
    PreferenceDataModule,
    PreferenceRow,
    SFTDataModule,
    SFTRow,
    UnlearningDataModule,
    UnlearningRow,
)
from lit_align.errors import DataError
from tests.tiny_models import tiny_tokenizer

TOKENIZER = tiny_tokenizer()
PAIRS = [{"prompt": "a" * (i % 7 + 1), "chosen": f" {i}", "rejected": " no"} for i in range(20)]


def write(path, rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


class Recorder(lightning.LightningModule):
    """Remembers which rows came in which step."""

    def __init__(self):
        super().__init__()
        self.weight = torch.nn.Parameter(torch.zeros(()))
        self.seen = {"train": [], "validation": [], "test": [], "predict": []}

    def training_step(self, batch, index):
        self.seen["train"].append((self.current_epoch, batch.row_ids[::2].tolist()))
        return self.weight

    def validation_step(self, batch, index):
        self.seen["validation"].append(batch.row_ids[::2].tolist())

    def test_step(self, batch, index):
        self.seen["test"].append(batch.row_ids[::2].tolist())

    def predict_step(self, batch, index):
        self.seen["predict"].append(batch.row_ids[::2].tolist())

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), 0.1)


def trainer(tmp_path, **settings):
    return lightning.Trainer(
        accelerator="cpu", logger=False, enable_checkpointing=False, enable_progress_bar=False,
        enable_model_summary=False, default_root_dir=tmp_path, max_epochs=2,
        num_sanity_val_steps=0, **settings,
    )  # fmt: skip


def test_every_stage_under_the_trainer(tmp_path):
    file = write(tmp_path / "pairs.jsonl", PAIRS)
    dm = PreferenceDataModule(TOKENIZER, file, file, file, file, batch_size=4, eval_batch_size=8)
    module, runner = Recorder(), trainer(tmp_path)
    runner.fit(module, dm)
    epochs = [[rows for e, rows in module.seen["train"] if e == epoch] for epoch in (0, 1)]
    assert all(sorted(itertools.chain(*rows)) == list(range(20)) for rows in epochs)
    assert epochs[0] != epochs[1]
    assert [len(rows) for rows in module.seen["validation"]] == [8, 8, 4] * 2
    runner.test(module, dm, verbose=False)
    assert sorted(itertools.chain(*module.seen["test"])) == list(range(20))
    runner.predict(module, dm)
    assert list(itertools.chain(*module.seen["predict"])) == list(range(20))


class RecorderOnDisk(Recorder):
    """Writes what each rank saw."""

    def __init__(self, folder):
        super().__init__()
        self.folder = folder

    def on_fit_end(self):
        path = self.folder / f"rank{self.global_rank}.json"
        path.write_text(json.dumps([rows for _, rows in self.seen["train"]]))


def test_two_processes_see_the_global_batches_of_one(tmp_path):
    pairs = PAIRS[:9]
    file = write(tmp_path / "pairs.jsonl", pairs)
    runner = trainer(tmp_path, devices=2, strategy="ddp_fork")
    runner.fit(RecorderOnDisk(tmp_path), PreferenceDataModule(TOKENIZER, file, batch_size=2))
    alone = Recorder()
    trainer(tmp_path).fit(alone, PreferenceDataModule(TOKENIZER, file, batch_size=4))
    ranks = [json.loads((tmp_path / f"rank{r}.json").read_text()) for r in (0, 1)]
    together = [sorted(i for i in a + b if i >= 0) for a, b in zip(*ranks, strict=True)]
    assert together == [sorted(rows) for _, rows in alone.seen["train"]]
    assert sum(a.count(-1) + b.count(-1) for a, b in zip(*ranks, strict=True)) == 2  # one an epoch


def test_bad_rows_stop_the_run_or_are_skipped(tmp_path):
    rows = [*PAIRS[:3], {**PAIRS[0], "rejected": PAIRS[0]["chosen"]}, {**PAIRS[0], "chosen": ""}]
    train, validation = (write(tmp_path / name, rows) for name in ("t.jsonl", "v.jsonl"))
    with pytest.raises(DataError, match=r"4 bad row") as caught:
        PreferenceDataModule(TOKENIZER, train, validation).setup("fit")
    assert "t.jsonl:4: chosen and rejected are identical" in str(caught.value)
    assert "v.jsonl:5: no response" in str(caught.value)
    out = tmp_path / "out"
    dm = PreferenceDataModule(TOKENIZER, train, validation, on_bad_row="skip", output_dir=str(out))
    dm.setup("fit")
    assert len(dm.train_rows) == len(dm.rows("validation")) == 3
    rejected = [json.loads(line) for line in (out / "rejected_rows.jsonl").open()]
    assert [row["line"] for row in rejected] == [4, 5, 4, 5]


def test_skipping_goes_to_the_trainers_folder(tmp_path):
    file = write(tmp_path / "t.jsonl", [*PAIRS, {}])
    runner = trainer(tmp_path / "root")
    runner.fit(Recorder(), PreferenceDataModule(TOKENIZER, file, on_bad_row="skip"))
    assert (tmp_path / "root" / "rejected_rows.jsonl").exists()


def test_a_split_without_usable_rows(tmp_path):
    file = write(tmp_path / "t.jsonl", [{}])
    dm = PreferenceDataModule(TOKENIZER, file, on_bad_row="skip", output_dir=str(tmp_path))
    with pytest.raises(DataError, match="the train split has no usable row"):
        dm.setup("fit")


@pytest.mark.parametrize("stage", ["fit", "validate"])
def test_validation_rows_split_off_the_train_rows(tmp_path, stage):
    file = write(tmp_path / "t.jsonl", PAIRS)
    dm = PreferenceDataModule(TOKENIZER, file, validation_fraction=0.25)
    dm.setup(stage)
    dm.setup(stage)
    assert len(dm.train_rows) + len(dm.rows("validation")) == 20
    assert len(dm.rows("validation")) >= 5


def test_no_validation_rows_no_loader():
    dm = PreferenceDataModule.from_rows(TOKENIZER, {"train": [PreferenceRow("a", " b", " c")]})
    dm.setup("fit")
    assert dm.val_dataloader() == [] and not dm.has_rows("validation")
    with pytest.raises(DataError, match="no validation rows"):
        dm.rows("validation")


def test_several_files_and_max_rows(tmp_path):
    files = [write(tmp_path / f"{i}.jsonl", PAIRS[i * 3 : i * 3 + 3]) for i in range(3)]
    dm = PreferenceDataModule(TOKENIZER, files, max_rows=5)
    dm.setup("fit")
    assert len(dm.train_rows) == 5


def test_sft_on_every_assistant_turn():
    prompt = [
        {"role": "user", "content": "a"},
        {"role": "assistant", "content": "b"},
        {"role": "user", "content": "c"},
    ]
    rows = {"train": [SFTRow(prompt, [{"role": "assistant", "content": "d"}])]}
    targets = []
    for train_on in ("last", "all_assistant"):
        dm = SFTDataModule.from_rows(TOKENIZER, rows, train_on=train_on)
        dm.setup("fit")
        (batch,) = dm.train_dataloader()
        targets.append(int(batch.token_weights.sum()))
    assert targets == [2, 4]  # "d", EOS and then "b", EOS, too


def test_unlearning_batches_hold_roles_and_weights():
    rows = [UnlearningRow([5], [6, 7], [0.0, 1.0]), UnlearningRow([5], [8], retain=True)]
    dm = UnlearningDataModule.from_rows(TOKENIZER, {"train": rows}, group_by_length=True)
    dm.setup("fit")
    (batch,) = dm.train_dataloader()
    assert batch.sequence_roles.tolist() == [REJECTED, CHOSEN]
    assert batch.token_weights.tolist() == [0, 1, 1]


def test_reference_log_probs_ride_along():
    dm = PreferenceDataModule.from_rows(TOKENIZER, {"train": [PreferenceRow([5], [6, 7], [8])]})
    dm.setup("fit")
    before = dm.fingerprint("train")
    dm.attach_reference_logps("train", [(np.array([-1.0, -2.0]), np.array([-3.0]))])
    (batch,) = dm.train_dataloader()
    assert batch.ref_per_token_logps.tolist() == [-1, -2, -3]
    assert dm.fingerprint("train") == before
    with pytest.raises(DataError, match="do not fit"):
        dm.attach_reference_logps("train", [(np.array([-1.0]), np.array([-3.0]))])


def test_the_reference_key_says_what_differs():
    def key(rows=(5, 6, 7), **settings):
        pair = PreferenceRow(*([i] for i in rows))
        dm = PreferenceDataModule.from_rows(TOKENIZER, {"train": [pair]}, **settings)
        dm.setup("fit")
        return dm.reference_key("train")

    def differing(other):
        return [name for name, value in key().items() if other[name] != value]

    assert differing(key()) == []
    assert differing(key(rows=(5, 6, 8))) == ["rows"]
    assert differing(key(max_length=9)) == ["truncation"]
    assert differing(key(chat_template="transcript")) == ["chat_template"]


def test_a_tokenizer_by_name_and_its_template(tiny_llama_dir):
    dm = PreferenceDataModule(str(tiny_llama_dir), chat_template="transcript")
    assert "Human" in dm.tokenizer.chat_template
    own = tiny_tokenizer()
    assert PreferenceDataModule(own, chat_template="transcript").tokenizer is not own
    assert "Human" not in own.chat_template


def test_counts_are_reported(caplog):
    rows = {"train": [PreferenceRow([5], [6, 7], [8])]}
    with caplog.at_level(logging.INFO):
        PreferenceDataModule.from_rows(TOKENIZER, rows).setup("fit")
    assert "train: 1 rows, 5 tokens, 3 targets" in caplog.text


@pytest.mark.parametrize(
    "settings",
    [
        {"batch_size": 0},
        {"eval_batch_size": 0},
        {"validation_fraction": 1.0},
        {"on_bad_row": "ignore"},
        {"train_on": "all"},
    ],
)
def test_settings_that_cannot_be(settings):
    with pytest.raises(DataError):
        SFTDataModule(TOKENIZER, **settings)


REAL = [
    (PreferenceDataModule, "hh_harmless_pairs"),
    (PreferenceDataModule, "dpo_mix_pairs"),
    (PreferenceDataModule, "oasst1_ranked_pairs"),
    (SFTDataModule, "sft_dolly"),
    (SFTDataModule, "gsm8k_train"),
    (SFTDataModule, "sft_oasst1"),
    (UnlearningDataModule, "hh_harmless_pairs"),
]


@pytest.mark.parametrize(("kind", "name"), REAL)
def test_real_data(kind, name, shared_dir):
    file = shared_dir / "data" / f"{name}.jsonl"
    dm = kind(TOKENIZER, str(file), max_length=8192, max_rows=200, batch_size=16)
    dm.setup("fit")
    batches = list(dm.train_dataloader())
    assert sorted(i for b in batches for i in set(b.row_ids.tolist())) == list(
        range(len(dm.train_rows))
    )
    ends = [b.target_ids[b.sequence_index.diff(append=torch.tensor([-1])) != 0] for b in batches]
    assert (torch.cat(ends) == TOKENIZER.eos_token_id).all()
