"""Token weights against human spans: characters to tokens, rows that are left out, whole runs."""

import json
from pathlib import Path

import numpy as np
import pytest

from lit_align.data import RowTokenizer, UnlearningRow
from lit_align.data.templates import TRANSCRIPT
from lit_align.errors import DataError, PipelineError
from lit_align.language_model import load_tokenizer
from lit_align.pipelines.settings import RunSettings
from lit_align.pipelines.token_auc import stages
from lit_align.pipelines.token_auc.error_spans import (
    labelled_tokens,
    read_spanned,
    response_offsets,
    tokens_in_spans,
)
from lit_align.pipelines.token_auc.pipeline import RewardTrainSettings, table, token_weight_auc
from lit_align.pipelines.token_auc.stages import TokenAucSettings, split_rows
from tests.tiny_models import tiny_tokenizer

RESPONSE = "Tom has 30 apples. Mia has 4 apples."


def row(number=0, spans=((8, 10),), **changes):
    errors = [{"error type": "Irrelevant", "start": a, "end": b} for a, b in spans]
    return {
        "id": f"q-{number}",
        "question": f"How many apples does Tom have at {number}?",
        "gold": "Tom has 3 apples.",
        "predictions": [RESPONSE, "x"],
        "errors": errors,
        "corrected": "Tom has 3 apples. Mia has 4 apples.",
    } | changes


def write(path: Path, rows) -> str:
    path.write_text("".join(json.dumps(each) + "\n" for each in rows), "utf-8")
    return str(path)


def spanned(tmp_path, *rows):
    return read_spanned(write(tmp_path / "rows.jsonl", rows))


# ---- characters to tokens --------------------------------------------------------------------


@pytest.mark.parametrize(
    ("spans", "expected"),
    [
        ([(3, 4)], [0, 1, 0]),
        ([(2, 3)], [0, 0, 0]),  # the space before a word is not the word
        ([(0, 1)], [1, 0, 0]),
        ([(1, 4)], [1, 1, 0]),
        ([(4, 5), (0, 2)], [1, 0, 1]),
        ([], [0, 0, 0]),
    ],
)
def test_tokens_in_spans_by_hand(spans, expected):
    assert tokens_in_spans("ab cd", [(0, 2), (2, 4), (4, 5)], spans).tolist() == expected


def test_a_token_of_white_space_and_one_without_characters():
    offsets = [(0, 1), (1, 3), (3, 3), (3, 4)]
    assert tokens_in_spans("a  b", offsets, [(0, 4)]).tolist() == [True, True, False, True]


def words_of(tokenizer, rows):
    """The text of the tokens that count as wrong, and of the others."""
    [one], excluded = labelled_tokens(rows, tokenizer)
    assert not excluded
    offsets = response_offsets(one.source.prediction, one.sequence, tokenizer)
    assert len(offsets) == len(one.wrong) == len(one.sequence.response_ids) - 1
    response = one.source.prediction.response
    texts = [response[a:b] for a, b in offsets]
    parts = [[t for t, w in zip(texts, one.wrong, strict=True) if w == wanted] for wanted in (1, 0)]
    return ["".join(part) for part in parts], one


def test_a_response_whose_text_is_in_the_template_too(tmp_path):
    """ "end" also stands in <|im_end|>, which follows it."""
    rows = spanned(tmp_path, row(predictions=["end"], spans=((0, 3),), corrected="no"))
    [prediction] = [one.prediction for one in rows]
    content = prediction.as_response("end")
    tokenize = RowTokenizer(tiny_tokenizer(), 100)
    sequence = tokenize(UnlearningRow(prediction.prompt, content)).sequences[0]
    offsets = response_offsets(prediction, sequence, tiny_tokenizer())
    assert "".join("end"[a:b] for a, b in offsets) == "end"


def with_transcript(tokenizer):
    tokenizer.chat_template = TRANSCRIPT
    return tokenizer


@pytest.mark.parametrize("template", [None, "transcript"])
def test_spans_hit_their_own_tokens_alone(template, tmp_path):
    tokenizer = tiny_tokenizer() if template is None else with_transcript(tiny_tokenizer())
    (wrong, right), _ = words_of(tokenizer, spanned(tmp_path, row(spans=((8, 10), (19, 22)))))
    assert "".join(wrong.split()) == "30Mia"
    assert "".join(right.split()) == "Tomhasapples.has4apples."


def test_characters_of_several_bytes_and_special_signs(tmp_path):
    response = "Él – “été” 中文 🙂 ok"
    spans = ((5, 10), (14, 15))
    rows = spanned(tmp_path, row(spans=spans, predictions=[response], corrected="Él ok"))
    [one], _ = labelled_tokens(rows, tiny_tokenizer())
    offsets = response_offsets(one.source.prediction, one.sequence, tiny_tokenizer())
    hit = {response[a:b].strip() for (a, b), w in zip(offsets, one.wrong, strict=True) if w}
    assert hit == {"“", "é", "t", "”", "🙂"} or "".join(sorted(hit)) == "".join(sorted("“ét”🙂"))


@pytest.mark.parametrize("name", ["stories260K"])
def test_a_sentencepiece_tokenizer(name, shared_dir, tmp_path):
    tokenizer = with_transcript(load_tokenizer(shared_dir / "models" / f"{name}_hf"))
    (wrong, _), _ = words_of(tokenizer, spanned(tmp_path, row(spans=((8, 10), (19, 22)))))
    assert "".join(wrong.split()) == "30Mia"


def test_rows_that_cannot_be_measured_are_counted(tmp_path):
    rows = spanned(
        tmp_path,
        row(0),
        row(1, spans=()),
        row(2, corrected=None),
        row(3, corrected=" "),
        row(4, spans=((0, len(RESPONSE)),)),
        row(5, predictions=["8<|im_end|>"], spans=((0, 1),)),
        row(6, spans=((7, 8),)),  # the space alone
    )
    kept, excluded = labelled_tokens(rows, tiny_tokenizer())
    assert [one.source.row_id for one in kept] == ["q-0"]
    assert excluded == {
        "no token in an error span": 2, "no correction": 2, "every token in an error span": 1,
        "special token as text": 1,
    }  # fmt: skip


def test_a_template_that_changes_the_response_is_told(tmp_path):
    tokenizer = tiny_tokenizer()
    tokenizer.chat_template = tokenizer.chat_template.replace(
        "message['content']", "message['content'] | replace('30', '31')"
    )
    _, excluded = labelled_tokens(spanned(tmp_path, row()), tokenizer)
    assert excluded == {"tokens whose characters are not known": 1}


BAD = {
    "predictions is not a list of texts": row(predictions=[]),
    "question is not text": row(question=None),
    "gold is not text": row(gold=" "),
    "prediction is not text": row(predictions=[3]),
    "control character": row(predictions=["a\x00b"], spans=((0, 1),)),
    "corrected is not text": row(corrected=["x"]),
    "errors is not a list of spans": row(errors="none"),
    "an error span outside the prediction": row(spans=((0, 99),)),
}


def test_bad_rows_are_named_together(tmp_path):
    with pytest.raises(DataError) as error:
        spanned(tmp_path, *BAD.values())
    for line, reason in enumerate(BAD, 1):
        assert f"rows.jsonl:{line}: {reason}" in str(error.value)


# ---- runs ------------------------------------------------------------------------------------


def test_the_split_is_drawn_from_the_seed(tmp_path):
    rows = spanned(tmp_path, *[row(i) for i in range(20)], row(20, spans=()))
    parts = [split_rows(rows, TokenAucSettings(train_rows=5, seed=seed)) for seed in (0, 0, 1)]
    ids = [[[one.row_id for one in part] for part in both] for both in parts]
    assert ids[0] == ids[1] != ids[2]
    assert len(ids[0][0]) == 5 and len(ids[0][1]) == 16 and not set(ids[0][0]) & set(ids[0][1])
    assert len(split_rows(rows, TokenAucSettings(train_rows=5, test_rows=3))[1]) == 3
    with pytest.raises(DataError, match="train_rows is 21, 20 rows have"):
        split_rows(rows, TokenAucSettings(train_rows=21))
    with pytest.raises(DataError, match="no row is left to measure"):
        split_rows(rows[:20], TokenAucSettings(train_rows=20))


def test_rows_to_measure_are_drawn_from_all_that_are_left(tmp_path):
    """Not those first that no training could take, for want of a correction."""
    rows = [row(i, corrected=None if i % 2 else "x") for i in range(80)]
    _, others = split_rows(spanned(tmp_path, *rows), TokenAucSettings(train_rows=30, test_rows=20))
    assert 0 < sum(one.correction is not None for one in others) < 20


def measured(tmp_path, model, monkeypatch, probabilities, rows):
    """A run whose reward model gives the probabilities that the test says."""

    def given(sequences, asked, **_):
        return [probabilities(len(s.response_ids)) for s in sequences]

    monkeypatch.setattr(stages, "token_probabilities", given)
    settings = TokenAucSettings(train=False, train_rows=1, bootstrap=50)
    file = write(tmp_path / "rows.jsonl", rows)
    return token_weight_auc(
        file, str(tmp_path / "run"), str(model), rows=settings, run=RunSettings(accelerator="cpu")
    )


def test_each_kind_of_weight_by_hand(tiny_llama_dir, tmp_path, monkeypatch):
    """The tokens of "30" alone are wrong, and the correction edits just them."""
    [one], _ = labelled_tokens(spanned(tmp_path, row()), tiny_tokenizer())
    wrong = np.append(one.wrong, False)
    unsure = int(np.flatnonzero(~wrong)[0])

    def probabilities(size):
        p = np.where(wrong, 0.2, 0.9).astype(np.float32)
        p[unsure] = 0.1  # a right token below the threshold, and less likely than the wrong ones
        assert size == len(p)
        return p

    found = measured(tmp_path, tiny_llama_dir, monkeypatch, probabilities, [row(i) for i in (0, 1)])
    right, bad = int((~one.wrong).sum()), int(one.wrong.sum())
    written = (tmp_path / "run" / "probabilities" / "tokens.json").read_text("utf-8")
    edited = json.loads(written)["rows"][0]["edited"]
    hits = np.array(edited)[one.wrong].sum() / bad
    false = np.array(edited)[~one.wrong].sum() / right
    expected = {
        "edit": hits * (1 - false) + (hits * false + (1 - hits) * (1 - false)) / 2,
        "binary": ((right - 1) + 0.5) / right,
        "soft": (right - 1) / right,
        "raw": 1 / right,
    }
    assert hits > 0.4 and false < 0.1
    for kind, value in expected.items():
        for x in ("pooled", "by_row"):
            assert found[kind][x]["value"] == pytest.approx(value, abs=1e-6), (kind, x)
    assert found["n"] == 1 and found["tokens"] == len(one.wrong)
    assert found["wrong_share"] == pytest.approx(bad / len(one.wrong))
    assert "| edit | " in table(found) and "reward model untrained" in table(found)


def test_a_whole_run_and_its_second_start(tiny_llama_dir, tmp_path, capsys):
    rows = [row(i, spans=((8, 10), (19, 22 + i % 3))) for i in range(9)]
    rows += [row(9, spans=()), row(10, corrected=None), row(11, gold="word " * 300)]
    file, output = write(tmp_path / "rows.jsonl", rows), tmp_path / "run"

    def run():
        return token_weight_auc(
            file,
            str(output),
            str(tiny_llama_dir),
            rows=TokenAucSettings(train_rows=3, identity_rows=1, bootstrap=20),
            train=RewardTrainSettings(learning_rate=1e-3, max_length=512),
            run=RunSettings(accelerator="cpu"),
        )

    first = run()
    assert first["n"] + sum(first["excluded"].values()) == 9
    assert first["excluded"]["no correction"] == first["excluded"]["no token in an error span"] == 1
    for kind in ("edit", "binary", "soft", "raw"):
        for x in ("pooled", "by_row"):
            estimate = first[kind][x]
            assert 0 <= estimate["low"] <= estimate["value"] <= estimate["high"] <= 1
    assert first["soft"]["pooled"]["value"] == pytest.approx(1 - first["raw"]["pooled"]["value"])
    assert json.loads((output / "results.json").read_text()) == first
    capsys.readouterr()
    assert run() == first
    assert capsys.readouterr().out.count("done before, skipped") == 3


def test_settings_that_cannot_be():
    with pytest.raises(PipelineError, match=r"rows\.threshold"):
        TokenAucSettings(threshold=0.0)


def test_real_spans(shared_dir):
    """All rows of the data set: what is left, and that every token's characters are known."""
    rows = read_spanned(str(shared_dir / "data" / "qa_feedback_spans.jsonl"))
    kept, excluded = labelled_tokens(rows, tiny_tokenizer())
    assert len(rows) == 300 and len(kept) > 250
    assert excluded.keys() <= {"no token in an error span", "no correction",
                               "every token in an error span"}  # fmt: skip
    for one in kept[:20]:
        offsets = response_offsets(one.source.prediction, one.sequence, tiny_tokenizer())
        text = one.source.prediction.response
        covered = {i for a, b in offsets for i in range(a, b)}
        assert covered == set(range(len(text)))
