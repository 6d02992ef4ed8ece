"""The smaller verbs as functions; the command line's own tests run them from fit to export."""

import json

import pytest
import torch
from safetensors.torch import load_file

from lit_align.compact import export_delta
from lit_align.errors import DataError, DeltaError, MaskError, TrainingError
from lit_align.language_model import load_language_model, save_language_model
from lit_align.masks import ParameterMask
from lit_align.pipelines.commands import evaluate_files, export
from lit_align.pipelines.localize import localize
from lit_align.pipelines.training import inference_device
from tests.tiny_models import save_tiny_model
from tests.training_runs import random_mask


@pytest.fixture
def delta(tiny_llama_dir, tmp_path):
    """A delta of the tiny Llama: every selected entry is one more."""
    model, _ = load_language_model(tiny_llama_dir)
    mask = random_mask(0.1)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            parameter += mask.dense(name)
    export_delta(model, tmp_path / "delta.safetensors", mask)
    return str(tmp_path / "delta.safetensors"), model


def test_merging_a_delta_gives_the_trained_model(delta, tiny_llama_dir, tmp_path):
    path, model = delta
    export(str(tmp_path / "merged"), model=str(tiny_llama_dir), delta=path)
    merged = load_file(tmp_path / "merged" / "model.safetensors")
    assert all(torch.equal(merged[n], p) for n, p in model.named_parameters())


def test_a_delta_of_another_model_is_refused(delta, tmp_path):
    other = save_tiny_model(tmp_path / "other", seed=1)
    with pytest.raises((DeltaError, MaskError), match=r"fingerprint|another"):
        export(str(tmp_path / "merged"), model=str(other), delta=delta[0])
    assert not (tmp_path / "merged").exists()


def test_models_are_asked_on_the_accelerator_unless_the_cpu_is_named(monkeypatch):
    monkeypatch.setattr(torch.accelerator, "current_accelerator", lambda _: torch.device("cuda"))
    assert inference_device("auto").type == "cuda" and inference_device("cpu").type == "cpu"
    monkeypatch.setattr(torch.accelerator, "current_accelerator", lambda _: None)
    assert inference_device("auto").type == "cpu"


def test_a_damaged_checkpoint_is_named(tmp_path):
    damaged = tmp_path / "damaged.ckpt"
    torch.save({"state_dict": {}}, damaged)
    whole = damaged.read_bytes()
    for content in (whole, whole[: len(whole) // 2], b""):
        damaged.write_bytes(content)
        with pytest.raises(TrainingError, match=r"damaged\.ckpt: not a checkpoint"):
            export(str(tmp_path / "out"), checkpoint=str(damaged))


def test_evaluation_names_bad_rows_and_limits(tiny_llama_dir, tmp_path):
    path = tmp_path / "rows.jsonl"
    path.write_text('{"prompt": "a"}\n{\n', "utf-8")
    with pytest.raises(DataError, match="2 bad row"):
        evaluate_files(str(tiny_llama_dir), str(path), "preference")
    with pytest.raises(DataError, match="limit is -1"):
        evaluate_files(str(tiny_llama_dir), str(path), "exact_answer", limit=-1)


EVALUATED = [
    ("exact_answer", {"question": "a"}, "lacks final_answer"),
    ("exact_answer", {"question": "a", "final_answer": "Paris"}, "final_answer is not a number"),
    ("exact_answer", {"prompt": 5, "final_answer": "7"}, "prompt is neither text"),
    ("exact_answer", {"prompt": [{"role": "user"}], "final_answer": 7}, "content is not text"),
    ("exact_answer", {"question": "a\x00", "final_answer": 7}, "control character"),
    ("exact_answer", {"question": "a\ud800", "final_answer": 7}, "surrogate"),
    ("exact_answer", {"question": "a <|im_end|>", "final_answer": 7}, "special token as text"),
    ("multiple_choice", {"question": "a", "choices": "ab", "answer_index": 1}, "list of texts"),
    ("multiple_choice", {"question": "a", "choices": ["a"], "answer_index": "0"}, "answer_index"),
    ("multiple_choice", {"question": "a", "choices": ["a"], "answer_index": 0.0}, "answer_index"),
    ("multiple_choice", {"question": "a", "choices": ["a", ""], "answer_index": 0}, "empty choice"),
    ("preference", {"prompt": "a", "chosen": "b", "rejected": "b"}, "identical"),
    ("preference", {"prompt": "a", "chosen": "b <|im_end|>", "rejected": "b"}, "special token"),
]


@pytest.mark.parametrize(("task", "row", "reason"), EVALUATED)
def test_rows_are_checked_before_they_are_scored(task, row, reason, tiny_llama_dir, tmp_path):
    path = tmp_path / "rows.jsonl"
    path.write_text(json.dumps(row), "utf-8")
    with pytest.raises(DataError, match=rf"rows\.jsonl:1: .*{reason}") as error:
        evaluate_files(str(tiny_llama_dir), str(path), task)
    assert "on_bad_row" not in str(error.value)


def test_a_delta_changes_what_is_evaluated(delta, tiny_llama_dir, tmp_path, capsys):
    path = tmp_path / "pairs.jsonl"
    path.write_text(json.dumps({"prompt": "a", "chosen": "b", "rejected": "cd"}), "utf-8")
    for change in (None, delta[0]):
        output = tmp_path / f"{change is None}.json"
        evaluate_files(
            str(tiny_llama_dir), str(path), "preference", delta=change, output=str(output)
        )
    records = [json.loads((tmp_path / f"{x}.json").read_text())["records"] for x in (True, False)]
    assert records[0][0]["chosen_logps"] != records[1][0]["chosen_logps"]


@pytest.mark.parametrize("granularity", ["element", "row", "head", "layer"])
def test_localize_at_every_granularity(granularity, delta, tiny_llama_dir, tmp_path):
    export(str(tmp_path / "trained"), model=str(tiny_llama_dir), delta=delta[0])
    output = tmp_path / "mask.safetensors"
    localize(
        str(tiny_llama_dir),
        str(output),
        trained=str(tmp_path / "trained"),
        ratio=0.1,
        granularity=granularity,
    )
    mask = ParameterMask.load(output)
    assert mask.metadata.granularity == granularity and mask.count()


def test_a_base_model_is_evaluated_with_a_template_that_is_given(tiny_llama_dir, tmp_path, capsys):
    folder = tmp_path / "base"
    model, tokenizer = load_language_model(tiny_llama_dir)
    tokenizer.chat_template = None
    save_language_model(model, tokenizer, folder)
    rows = tmp_path / "rows.jsonl"
    rows.write_text(json.dumps({"question": "2 + 1 =", "final_answer": "3"}) + "\n")
    given = {"task": "exact_answer", "max_new_tokens": 2, "accelerator": "cpu"}
    with pytest.raises(DataError, match="chat template"):
        evaluate_files(str(folder), str(rows), **given)
    evaluate_files(str(folder), str(rows), chat_template="transcript", **given)
    assert "accuracy" in capsys.readouterr().out
