"""Answers to benchmarks: the judges' formats, turns that see each other, and killed runs."""

import json
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from lit_align.errors import DataError, ModelError
from lit_align.evaluation import conversations
from lit_align.evaluation.conversations import Question, converse
from lit_align.pipelines.generation import generate as module
from lit_align.pipelines.generation.answer_file import AnswerFile
from lit_align.pipelines.generation.generate import generate_answers
from lit_align.pipelines.generation.questions import read_questions
from tests.tiny_models import tiny_model, tiny_tokenizer

TWO_TURNS = [
    {"id": f"mt-bench-{80 + i}", "category": category, "turns": [f"Tom has {i}?", "And Mia?"]}
    for i, category in enumerate(["writing", "math", "stem", "coding", "other"])
]
PROMPTS = [{"id": str(i), "prompt": f"How many apples are {i}?"} for i in range(5)]


def write(path: Path, rows) -> str:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), "utf-8")
    return str(path)


def answer(model, data, output, **settings):
    given = {"max_new_tokens": 5, "accelerator": "cpu", "batch_size": 2} | settings
    return generate_answers(str(model), data, str(output), **given)


def lines(path):
    return [json.loads(line) for line in Path(path).read_text("utf-8").splitlines()]


# ---- conversations ----------------------------------------------------------------------------


def test_the_second_turn_sees_the_first_answer(monkeypatch):
    asked = []

    def generate(model, tokenizer, prompts, **settings):
        asked.append((prompts, settings["keys"]))
        return [[f" answer {len(asked)}.{i} END more"] for i in range(len(prompts))]

    monkeypatch.setattr(conversations, "generate", generate)
    system = {"role": "system", "content": "Be brief."}
    questions = [Question("a", ("1?", "2?"), (system,)), Question("b", ("3?",))]
    found = converse(
        tiny_model(), tiny_tokenizer(), questions, max_new_tokens=4, num_choices=2, stop="END"
    )
    assert found == [[["answer 1.0", "answer 2.0"], ["answer 1.1", "answer 2.1"]],
                     [["answer 1.2"], ["answer 1.3"]]]  # fmt: skip
    assert asked[0][1] == ["a/0/0", "a/1/0", "b/0/0", "b/1/0"] and asked[1][1] == ["a/0/1", "a/1/1"]
    assert asked[1][0][0] == [
        system,
        {"role": "user", "content": "1?"},
        {"role": "assistant", "content": "answer 1.0"},
        {"role": "user", "content": "2?"},
    ]


def test_greedy_turns_equal_those_of_transformers(tiny_llama_dir):
    model = AutoModelForCausalLM.from_pretrained(tiny_llama_dir).eval()
    tokenizer = AutoTokenizer.from_pretrained(tiny_llama_dir)
    with torch.no_grad():  # a random model's logits lie too close together
        model.get_output_embeddings().weight.mul_(20)
    question = Question("q", ("Tom has 3 apples", "How many?"))
    [[answers]] = converse(model, tokenizer, [question], max_new_tokens=6, progress=False)
    messages = []
    for turn, found in zip(question.turns, answers, strict=True):
        messages.append({"role": "user", "content": turn})
        ids = tokenizer.apply_chat_template(
            messages, add_generation_prompt=True, return_tensors="pt", return_dict=True
        )
        out = model.generate(**ids, max_new_tokens=6, do_sample=False)
        text = tokenizer.decode(out[0, ids["input_ids"].shape[1] :], skip_special_tokens=True)
        assert found == text.strip()
        messages.append({"role": "assistant", "content": found})


def test_draws_do_not_depend_on_the_other_questions():
    model, tokenizer = tiny_model().eval(), tiny_tokenizer()
    questions = [Question(f"q{i}", (f"How many are {i}?", "Why?")) for i in range(4)]
    settings = {"max_new_tokens": 5, "temperature": 1.0, "num_choices": 2, "progress": False}
    together = converse(model, tokenizer, questions, **settings)
    alone = [converse(model, tokenizer, [q], **settings)[0] for q in reversed(questions)]
    assert together == alone[::-1]
    assert together[0][0] != together[0][1]
    assert together != converse(model, tokenizer, questions, seed=1, **settings)


def test_what_does_not_fit_into_the_context_is_named():
    question = Question("mt-7", ("How many?", "Why?"))
    with pytest.raises(DataError, match=r"mt-7: \d+ tokens of questions and 2 x 250 .* 512"):
        converse(tiny_model(), tiny_tokenizer(), [question], max_new_tokens=250)


# ---- files ---------------------------------------------------------------------------------


def test_alpaca_eval_file(tiny_llama_dir, tmp_path, capsys):
    rows = [
        {"instruction": "Say hello.", "dataset": "helpful_base", "output": "a reference"},
        {"instruction": "Add.", "input": "1 and 2"},
        {"prompt": "plain"},
        {"prompt": [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "x"}]},
        {"question": "Which?", "choices": ["red", "hen"]},
    ]
    output = tmp_path / "new" / "out.json"
    summary = answer(tiny_llama_dir, write(tmp_path / "set.jsonl", rows), output, name="me")
    records = json.loads(output.read_text("utf-8"))
    assert all(list(r) == ["dataset", "instruction", "output", "generator"] for r in records)
    assert [r["instruction"] for r in records] == [
        "Say hello.", "Add.\n\n1 and 2", "plain", "x",
        'Which?\nA. red\nB. hen\nEnd with "The answer is: ..."',
    ]  # fmt: skip
    assert [r["dataset"] for r in records] == ["helpful_base", *["set"] * 4]
    assert {r["generator"] for r in records} == {"me"}
    assert summary["answers"] == 5 and summary["kept"] == 0
    assert json.loads(capsys.readouterr().out.splitlines()[-1]) == summary


def test_mt_bench_file(tiny_llama_dir, tmp_path):
    data, output = write(tmp_path / "mt.jsonl", TWO_TURNS), tmp_path / "model.jsonl"
    answer(tiny_llama_dir, data, output, format="mt_bench", num_choices=2, temperature=1.0)
    records = lines(output)
    assert [r["question_id"] for r in records] == [80, 81, 82, 83, 84]
    fields = {"question_id", "answer_id", "model_id", "choices", "tstamp"}
    assert all(r.keys() == fields and isinstance(r["tstamp"], float) for r in records)
    assert len({r["answer_id"] for r in records}) == 5
    assert {r["model_id"] for r in records} == {tiny_llama_dir.name}
    for record in records:
        assert [c["index"] for c in record["choices"]] == [0, 1]
        assert all(len(c["turns"]) == 2 for c in record["choices"])


def test_a_killed_run_ends_in_the_same_answers(tiny_llama_dir, tmp_path, monkeypatch):
    data = write(tmp_path / "a.jsonl", PROMPTS)
    settings = {"temperature": 1.0, "seed": 3}
    answer(tiny_llama_dir, data, tmp_path / "whole.json", **settings)
    added = []

    def add(self, answers):
        if len(added) == 1:
            raise KeyboardInterrupt
        added.append(answers)
        write_file(self, answers)

    write_file = AnswerFile.add
    monkeypatch.setattr(AnswerFile, "add", add)
    output = tmp_path / "killed.json"
    with pytest.raises(KeyboardInterrupt):
        answer(tiny_llama_dir, data, output, **settings)
    monkeypatch.setattr(AnswerFile, "add", write_file)
    assert len(json.loads(output.read_text())) == 2
    assert answer(tiny_llama_dir, data, output, **settings)["kept"] == 2
    assert output.read_text() == (tmp_path / "whole.json").read_text()


def test_answers_that_are_there_are_kept_as_they_are(tiny_llama_dir, tmp_path):
    data, output = write(tmp_path / "mt.jsonl", TWO_TURNS), tmp_path / "model.jsonl"
    settings = {"format": "mt_bench"}
    answer(tiny_llama_dir, data, output, limit=3, **settings)
    records = lines(output)
    assert len(records) == 3
    records[0]["choices"][0]["turns"][0] = "mine"
    write(output, [records[2], records[0]])
    assert answer(tiny_llama_dir, data, output, limit=4, **settings)["kept"] == 2
    again = lines(output)
    assert [r["question_id"] for r in again] == [80, 81, 82, 83]
    assert again[0] == records[0] and again[2] == records[2]
    assert again[1]["choices"] == records[1]["choices"]


def test_nothing_to_do_leaves_the_file_alone(tiny_llama_dir, tmp_path, monkeypatch):
    data, output = write(tmp_path / "a.jsonl", PROMPTS[:1]), tmp_path / "a.json"
    answer(tiny_llama_dir, data, output)
    monkeypatch.setattr(module, "converse", None)
    assert answer(tiny_llama_dir, data, output) | {"seconds": 0} == {
        "answers": 1, "kept": 1, "seconds": 0, "output": str(output),
    }  # fmt: skip


def test_temperatures_by_category(tiny_llama_dir, tmp_path, monkeypatch):
    seen = {}

    def spy(model, tokenizer, questions, *, temperature, **settings):
        seen.update({q.key: temperature for q in questions})
        return [[["x", "y"]] for _ in questions]

    monkeypatch.setattr(module, "converse", spy)
    data = write(tmp_path / "mt.jsonl", TWO_TURNS)
    answer(tiny_llama_dir, data, tmp_path / "m", format="mt_bench", temperature="category")
    assert seen == {"80": 0.7, "81": 0.0, "82": 0.1, "83": 0.0, "84": 0.7}


def test_a_model_without_a_chat_template(tiny_llama_dir, tmp_path):
    model, tokenizer = tiny_model(), tiny_tokenizer()
    tokenizer.chat_template = None
    model.save_pretrained(tmp_path / "base")
    tokenizer.save_pretrained(tmp_path / "base")
    data = write(tmp_path / "a.jsonl", PROMPTS[:2])
    with pytest.raises(DataError, match=r"no chat template: give --chat_template"):
        answer(tmp_path / "base", data, tmp_path / "a.json")
    settings = {"chat_template": "transcript", "stop": "\n\nHuman:"}
    assert answer(tmp_path / "base", data, tmp_path / "a.json", **settings)["answers"] == 2


def test_an_adapter_changes_the_answers(tiny_llama_dir, tmp_path):
    from peft import LoraConfig, get_peft_model

    torch.manual_seed(0)
    config = LoraConfig(r=4, lora_alpha=800, target_modules=["q_proj", "up_proj"],
                        init_lora_weights=False)  # fmt: skip
    get_peft_model(tiny_model(), config).save_pretrained(tmp_path / "adapter")
    data = write(tmp_path / "a.jsonl", PROMPTS)
    answer(tiny_llama_dir, data, tmp_path / "base.json")
    answer(tiny_llama_dir, data, tmp_path / "a.json", adapter=str(tmp_path / "adapter"))
    outputs = [[r["output"] for r in json.loads((tmp_path / n).read_text())]
               for n in ("base.json", "a.json")]  # fmt: skip
    assert outputs[0] != outputs[1]


# ---- bad input ---------------------------------------------------------------------------------


def test_files_of_other_runs_are_not_continued(tiny_llama_dir, tmp_path):
    data, output = write(tmp_path / "a.jsonl", PROMPTS[:2]), tmp_path / "a.json"
    answer(tiny_llama_dir, data, output)
    with pytest.raises(DataError, match=r"other settings: seed \(0 there, 5\), top_p"):
        answer(tiny_llama_dir, data, output, seed=5, top_p=0.9)
    with pytest.raises(DataError, match="other settings: questions"):
        answer(tiny_llama_dir, write(tmp_path / "b.jsonl", PROMPTS[2:]), output)
    output.write_text("[")
    with pytest.raises(DataError, match="damaged"):
        answer(tiny_llama_dir, data, output)
    output.write_text('[{"instruction": "another"}]')
    with pytest.raises(DataError, match="not among these"):
        answer(tiny_llama_dir, data, output)
    (tmp_path / "a.json.settings.json").unlink()
    with pytest.raises(DataError, match=r"a\.json\.settings\.json.* cannot be read"):
        answer(tiny_llama_dir, data, output)


BAD = {
    "turns is not a list of texts": {"turns": []},
    "neither `turns`": {"text": "x"},
    "empty prompt": {"prompt": " "},
    "special token as text": {"turns": ["a", "<|im_end|>"]},
    "control character": {"instruction": "\x07"},
    "instruction or input is not text": {"instruction": "x", "input": 3},
    "prompt is neither text nor messages": {"prompt": [1, 2]},
    "roles out of order": {"prompt": [{"role": "assistant", "content": "x"}]},
}


def test_bad_questions_are_named_together(tmp_path):
    data = write(tmp_path / "a.jsonl", BAD.values())
    with pytest.raises(DataError) as error:
        read_questions(data, tiny_tokenizer())
    for line, reason in enumerate(BAD, 1):
        assert f"a.jsonl:{line}: {reason}" in str(error.value)
    with pytest.raises(DataError, match="holds no question"):
        read_questions(write(tmp_path / "b.jsonl", []), tiny_tokenizer())


@pytest.mark.parametrize(
    ("settings", "error", "message"),
    [
        ({"limit": 0}, DataError, "at least 1"),
        ({"num_choices": 2}, DataError, "num_choices is of mt_bench"),
        ({"temperature": -1.0}, ModelError, "temperature"),
        ({"adapter": "absent"}, ModelError, "absent has no adapter_config.json"),
        ({"max_new_tokens": 600}, DataError, "lower max_new_tokens"),
    ],
)
def test_settings_that_cannot_be(settings, error, message, tiny_llama_dir, tmp_path):
    with pytest.raises(error, match=message):
        answer(tiny_llama_dir, write(tmp_path / "a.jsonl", PROMPTS), tmp_path / "a", **settings)


def test_an_output_that_cannot_be_is_said_before_any_answer(tiny_llama_dir, tmp_path, monkeypatch):
    monkeypatch.setattr(module, "converse", lambda *_, **__: pytest.fail("answered"))
    with pytest.raises(OSError, match="/proc/no"):
        answer(tiny_llama_dir, write(tmp_path / "q.jsonl", PROMPTS), "/proc/no/answers.json")


def test_alpaca_eval_has_one_turn(tiny_llama_dir, tmp_path):
    data = write(tmp_path / "mt.jsonl", TWO_TURNS)
    with pytest.raises(DataError, match="question 80 has 2 turns, alpaca_eval holds one"):
        answer(tiny_llama_dir, data, tmp_path / "a.json")


def test_numbers_of_questions(tmp_path):
    def ids(rows):
        return [q.question_id for q in read_questions(write(tmp_path / "a.jsonl", rows),
                                                       tiny_tokenizer())]  # fmt: skip

    asked = {"prompt": "x"}
    assert ids([asked | {"question_id": 7}, asked | {"question_id": "b"}]) == [7, "b"]
    assert ids([asked | {"id": "vicuna-66"}, asked | {"id": "vicuna-1"}]) == [66, 1]
    assert ids([asked | {"id": "a-1"}, asked | {"id": "b-1"}, asked]) == [1, 2, 3]


def test_real_benchmarks(shared_dir, tmp_path):
    for name, count in (("mt_bench", 64), ("vicuna_bench", 60), ("xstest", 300)):
        asked = read_questions(str(shared_dir / "data" / f"{name}.jsonl"), tiny_tokenizer())
        assert len(asked) == count and all(isinstance(q.question_id, int) for q in asked)
