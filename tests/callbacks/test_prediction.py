"""The log-probs that `predict` writes."""

import json

import pytest

from lit_align.callbacks import LogpsWriter
from lit_align.language_model import load_language_model
from lit_align.modules import MaskedDPO, SupervisedFineTuning
from tests.callbacks.test_key_parameters import dense_logps
from tests.training_runs import instructions, preference_rows, preferences, sft_rows, trainer


def test_pairs_in_row_order_with_the_reference(tiny_llama_dir, tmp_path):
    settings = {"batch_size": 3, "splits": {"predict": preference_rows(7, seed=3)}}
    data, padded = preferences(4, **settings), preferences(4, layout="padded", **settings)
    output = tmp_path / "there" / "logps.jsonl"
    run = trainer(tmp_path, callbacks=[LogpsWriter(str(output))])
    run.predict(MaskedDPO(str(tiny_llama_dir)), data)
    records = [json.loads(line) for line in output.read_text().splitlines()]
    assert [r["row_id"] for r in records] == [i for i in range(7) for _ in range(2)]
    assert [r["role"] for r in records] == ["chosen", "rejected"] * 7
    model, _ = load_language_model(tiny_llama_dir)
    padded.setup("predict")
    expected = [
        float(logp) for batch in padded.predict_dataloader() for logp in dense_logps(model, batch)
    ]
    assert [r["logp"] for r in records] == pytest.approx(expected, rel=1e-4)
    assert [r["ref_logp"] for r in records] == pytest.approx(expected, rel=1e-4)
    lengths = [len(x) for row in preference_rows(7, seed=3) for x in (row.chosen, row.rejected)]
    assert [r["num_tokens"] for r in records] == lengths


def test_without_a_reference_and_by_default_in_the_runs_folder(tiny_llama_dir, tmp_path):
    data = instructions(4, splits={"predict": sft_rows(3, seed=3)})
    trainer(tmp_path, callbacks=[LogpsWriter()]).predict(
        SupervisedFineTuning(str(tiny_llama_dir)), data
    )
    records = [json.loads(line) for line in (tmp_path / "logps.jsonl").read_text().splitlines()]
    assert [r["row_id"] for r in records] == [0, 1, 2]
    assert all("ref_logp" not in r for r in records)
