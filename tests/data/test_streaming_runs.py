"""Streams under Lightning's Trainer: epochs, ranks, checkpoints, references, bad rows."""

import json
from itertools import chain

import pytest
from lightning.pytorch.callbacks import ModelCheckpoint

from lit_align.callbacks import KeyParameterLocalization, LogpsWriter
from lit_align.data import PreferenceDataModule, SFTDataModule
from lit_align.errors import DataError
from lit_align.masks import ParameterMask
from lit_align.modules import MaskedDPO, SupervisedFineTuning
from tests.data.test_datamodules import Recorder, RecorderOnDisk, trainer
from tests.tiny_models import tiny_tokenizer
from tests.training_runs import assert_equal_weights, random_mask, weights
from tests.training_runs import trainer as quiet_trainer

TOKENIZER = tiny_tokenizer()
PAIRS = [{"prompt": "a" * (i % 7 + 1), "chosen": f" {i}", "rejected": " no"} for i in range(10)]
ROWS = [{"prompt": f"How many are {i}?", "completion": f" It is {i}."} for i in range(10)]


def write(path, rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


def pairs(tmp_path, rows=PAIRS, **settings):
    file = write(tmp_path / "pairs.jsonl", rows)
    given = {"batch_size": 2, "streaming": True, "shuffle_buffer": 4} | settings
    return PreferenceDataModule(TOKENIZER, file, **given)


def instructions(tmp_path, **settings):
    file = write(tmp_path / "rows.jsonl", ROWS)
    given = {"batch_size": 2, "streaming": True, "shuffle_buffer": 4} | settings
    return SFTDataModule(TOKENIZER, file, **given)


def epochs_of(recorder):
    found: dict = {}
    for epoch, rows in recorder.seen["train"]:
        found.setdefault(epoch, []).append(rows)
    return found


@pytest.mark.parametrize("num_workers", [0, 2])
def test_each_epoch_has_every_row_once_in_a_new_order(num_workers, tmp_path):
    module = Recorder()
    trainer(tmp_path, max_steps=13).fit(module, pairs(tmp_path, num_workers=num_workers))
    epochs = epochs_of(module)
    assert [len(rows) for rows in epochs.values()] == [5, 5]  # max_epochs is 2
    assert all(sorted(chain(*rows)) == list(range(10)) for rows in epochs.values())
    assert epochs[0] != epochs[1]
    again = Recorder()
    trainer(tmp_path, max_steps=13).fit(again, pairs(tmp_path))
    assert again.seen == module.seen


def test_two_processes_see_the_global_batches_of_one(tmp_path):
    bad = [*PAIRS[:4], PAIRS[0] | {"chosen": ""}, *PAIRS[4:9]]  # row 4 cannot be used
    settings = {"on_bad_row": "skip", "output_dir": str(tmp_path / "bad")}
    runner = trainer(tmp_path, devices=2, strategy="ddp_fork", max_steps=20)
    runner.fit(RecorderOnDisk(tmp_path), pairs(tmp_path, bad, batch_size=2, **settings))
    alone = Recorder()
    trainer(tmp_path, max_steps=20).fit(alone, pairs(tmp_path, bad, batch_size=4, **settings))
    ranks = [json.loads((tmp_path / f"rank{r}.json").read_text()) for r in (0, 1)]
    together = [sorted(i for i in a + b if i >= 0) for a, b in zip(*ranks, strict=True)]
    assert together == [sorted(rows) for _, rows in alone.seen["train"]]
    assert len(together) == 6
    told = [p.read_text().count('"line": 5') for p in (tmp_path / "bad").iterdir()]
    assert sum(told) in (1, 2)  # by the rank that met it; in the second epoch maybe the other one


def test_validation_test_and_predict_stream_in_the_order_of_the_file(tmp_path):
    file = write(tmp_path / "p.jsonl", PAIRS)
    data = PreferenceDataModule(
        TOKENIZER, file, file, file, file, batch_size=4, eval_batch_size=3, streaming=True
    )
    module, runner = Recorder(), trainer(tmp_path, max_steps=6)
    runner.fit(module, data)
    in_order = [[0, 1, 2], [3, 4, 5], [6, 7, 8], [9]]
    assert module.seen["validation"] == in_order * 2
    runner.test(module, data, verbose=False)
    assert module.seen["test"] == in_order
    runner.predict(module, data)
    assert module.seen["predict"] == in_order


# ---- checkpoints ---------------------------------------------------------------------------


def fit(folder, data, *, ckpt_path=None, steps=10, **settings):
    module = SupervisedFineTuning(str(folder), learning_rate=1e-2)
    saving = ModelCheckpoint(data.output_dir, "{step}", every_n_train_steps=1, save_top_k=-1)
    run = quiet_trainer(
        data.output_dir, callbacks=[saving], enable_checkpointing=True, max_epochs=2,
        max_steps=steps, **settings,
    )  # fmt: skip
    run.fit(module, data, ckpt_path=ckpt_path)
    assert run.global_step == steps
    return weights(module)


@pytest.mark.parametrize("step", [1, 4, 5, 7, 9])
def test_a_resumed_run_ends_like_an_uninterrupted_one(step, tiny_llama_dir, tmp_path):
    """Five batches an epoch: from the middle and from the end of the first, and from the second."""

    def data():
        return instructions(tmp_path, output_dir=str(tmp_path / "out"))

    whole = fit(tiny_llama_dir, data())
    checkpoint = tmp_path / "out" / f"step={step}.ckpt"
    assert_equal_weights(whole, fit(tiny_llama_dir, data(), ckpt_path=checkpoint))


def test_resuming_between_accumulation_windows_and_with_workers(tiny_llama_dir, tmp_path):
    def data(**settings):
        return instructions(tmp_path, output_dir=str(tmp_path / "out"), **settings)

    settings = {"accumulate_grad_batches": 2, "steps": 6}
    whole = fit(tiny_llama_dir, data(), **settings)
    checkpoint = tmp_path / "out" / "step=2.ckpt"
    resumed = fit(tiny_llama_dir, data(num_workers=2), ckpt_path=checkpoint, **settings)
    assert_equal_weights(whole, resumed)


def test_a_resumed_run_keeps_the_rejected_rows(tiny_llama_dir, tmp_path):
    rows = [*ROWS[:1], {"text": "x"}, *ROWS[2:8], {"text": "y"}, ROWS[9]]
    out = tmp_path / "out"

    def data():
        file = write(tmp_path / "rows.jsonl", rows)
        return SFTDataModule(
            TOKENIZER, file, batch_size=2, streaming=True, shuffle_buffer=0, on_bad_row="skip",
            output_dir=str(out),
        )  # fmt: skip

    fit(tiny_llama_dir, data(), steps=3)
    rejected = out / "rejected_rows.jsonl"
    assert [json.loads(line)["line"] for line in rejected.open()] == [2]
    fit(tiny_llama_dir, data(), ckpt_path=out / "step=3.ckpt", steps=10)
    assert [json.loads(line)["line"] for line in rejected.open()] == [2, 9]


# ---- what streaming needs, and what it cannot do ----------------------------------------------


def test_training_needs_a_number_of_steps(tiny_llama_dir, tmp_path):
    module = SupervisedFineTuning(str(tiny_llama_dir))
    with pytest.raises(DataError, match=r"set trainer\.max_steps"):
        quiet_trainer(tmp_path).fit(module, instructions(tmp_path))
    quiet_trainer(tmp_path, limit_train_batches=2).fit(
        SupervisedFineTuning(str(tiny_llama_dir)), instructions(tmp_path)
    )


def test_a_reference_cache_is_refused_and_swap_does_the_same(tiny_llama_dir, tmp_path):
    random_mask(0.3).save(tmp_path / "mask")

    def run(streaming, reference):
        module = MaskedDPO(str(tiny_llama_dir), reference=reference, learning_rate=1e-2)
        data = pairs(tmp_path, streaming=streaming, shuffle_buffer=0)
        if not streaming:  # in the order of the file, as the stream
            data.dataloader = lambda split, size, **_: type(data).dataloader(
                data, split, size, group_by_length=False
            )
        masked = KeyParameterLocalization(mask=str(tmp_path / "mask"))
        quiet_trainer(tmp_path, callbacks=[masked], max_steps=5).fit(module, data)
        return weights(module)

    with pytest.raises(DataError, match=r"streamed.*set reference: swap"):
        run(streaming=True, reference="cache")
    assert_equal_weights(run(True, "swap"), run(False, "swap"))


def test_gradient_scores_of_a_stream(tiny_llama_dir, tmp_path):
    def run():
        module = SupervisedFineTuning(str(tiny_llama_dir))
        found = KeyParameterLocalization("gradient", 0.1, num_batches=2)
        quiet_trainer(tmp_path, callbacks=[found], max_steps=1).fit(module, instructions(tmp_path))
        return ParameterMask.load(tmp_path / "mask.safetensors").digest

    assert run() == run()


def test_predictions_of_a_stream(tiny_llama_dir, tmp_path):
    file = write(tmp_path / "rows.jsonl", ROWS)
    data = SFTDataModule(TOKENIZER, predict_file=file, batch_size=4, streaming=True)
    run = quiet_trainer(tmp_path, callbacks=[LogpsWriter()])
    run.predict(SupervisedFineTuning(str(tiny_llama_dir)), data)
    lines = (tmp_path / "logps.jsonl").read_text("utf-8").splitlines()
    assert [json.loads(line)["row_id"] for line in lines] == list(range(10))


def test_a_bad_row_stops_the_run_when_it_is_met(tmp_path):
    rows = [*PAIRS[:5], PAIRS[5] | {"rejected": PAIRS[5]["chosen"]}, *PAIRS[6:]]
    for num_workers in (0, 1):
        module = Recorder()
        data = pairs(tmp_path, rows, shuffle_buffer=0, num_workers=num_workers)
        with pytest.raises(DataError, match=r"pairs\.jsonl:6: chosen and rejected are identical"):
            trainer(tmp_path, max_steps=9).fit(module, data)
        assert module.seen["train"] == [(0, [0, 1])]  # the next batch was fetched ahead


def test_skipped_rows_of_a_stream(tmp_path):
    rows = [*PAIRS[:5], PAIRS[5] | {"rejected": PAIRS[5]["chosen"]}, *PAIRS[6:]]
    module = Recorder()
    data = pairs(tmp_path, rows, on_bad_row="skip")
    trainer(tmp_path / "root", max_steps=10).fit(module, data)
    for batches in epochs_of(module).values():
        assert sorted(chain(*batches)) == [0, 1, 2, 3, 4, 6, 7, 8, 9] and len(batches) == 5
    written = (tmp_path / "root" / "rejected_rows.jsonl").read_text().splitlines()
    assert [json.loads(line)["line"] for line in written] == [6]


def test_a_stream_smaller_than_a_batch_and_one_without_rows(tmp_path):
    module = Recorder()
    trainer(tmp_path, max_steps=2).fit(module, pairs(tmp_path, PAIRS[:1], batch_size=8))
    assert module.seen["train"] == [(0, [0]), (1, [0])]
    with pytest.raises(DataError, match="no usable row"):
        trainer(tmp_path, max_steps=2).fit(
            Recorder(), pairs(tmp_path, [{"text": "x"}], on_bad_row="skip")
        )
