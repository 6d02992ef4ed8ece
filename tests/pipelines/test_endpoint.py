"""An endpoint against a local stub: what is sent, kept, asked again, refused and named."""

import json
import threading
import time

import pytest

from lit_align.errors import DataError, PipelineError, TrainingError
from lit_align.pipelines.allo import rewards as allo_rewards
from lit_align.pipelines.allo.pipeline import stages_of
from lit_align.pipelines.allo.run import AlloRun
from lit_align.pipelines.rewards.corrections import RemoteTeacher, correct_predictions
from lit_align.pipelines.rewards.endpoint import Endpoint, ask
from lit_align.pipelines.rewards.endpoint_request import MALFORMED, REFUSED
from lit_align.pipelines.rewards.predictions import Prediction
from lit_align.pipelines.rows import write_jsonl
from lit_align.pipelines.settings import DataSettings, SFTSettings, TokenRewardSettings
from tests.pipelines.allo_settings import TINY, tiny_allo
from tests.pipelines.stub_endpoint import StubEndpoint, completion, slowly
from tests.tiny_models import tiny_tokenizer

KEY = "LIT_ALIGN_TEST_KEY"
SECRET = "sk-very-secret"
PROMPTS = [[{"role": "user", "content": f"question {i}"}] for i in range(4)]


@pytest.fixture(autouse=True)
def _environment(monkeypatch):
    monkeypatch.setenv(KEY, SECRET)
    monkeypatch.setenv("no_proxy", "127.0.0.1")


def echo(number, messages):
    return completion(f"to {messages[-1]['content']}")


def at(stub, tmp_path, **settings):
    return Endpoint(stub.url, "teacher", tmp_path / "cache", **{"backoff_seconds": 0.01} | settings)


def texts(answers):
    return [[answer.text for answer in samples] for samples in answers]


def test_what_is_sent_and_answered(tmp_path, capsys):
    with StubEndpoint(echo) as stub:
        endpoint = at(stub, tmp_path, key_variable=KEY, max_tokens=7, temperature=0.5)
        found = ask(endpoint, PROMPTS, 2, progress=False)
    assert texts(found) == [[f"to question {i}"] * 2 for i in range(4)]
    assert len(stub.requests) == 8
    path, headers, payload = stub.requests[0]
    assert path == "/v1/chat/completions"
    assert headers["Authorization"] == f"Bearer {SECRET}"
    assert payload == {
        "model": "teacher", "messages": payload["messages"], "max_tokens": 7, "temperature": 0.5,
    }  # fmt: skip
    kept = "".join(p.read_text() for p in (tmp_path / "cache").iterdir())
    said = capsys.readouterr()
    assert SECRET not in kept + said.out + said.err
    assert f"8 requests to {stub.url}/chat/completions (0 answered from the cache)" in said.out


def test_without_a_key_variable_no_key_is_sent(tmp_path):
    with StubEndpoint(echo) as stub:
        ask(at(stub, tmp_path), PROMPTS[:1], progress=False)
    assert "Authorization" not in stub.requests[0][1]


def test_answers_are_paid_for_once(tmp_path):
    with StubEndpoint(echo) as stub:
        first = ask(at(stub, tmp_path), PROMPTS[:2], progress=False)
        again = ask(at(stub, tmp_path), PROMPTS, progress=False)
        assert len(stub.requests) == 4 and again[:2] == first
        ask(at(stub, tmp_path, temperature=1.0), PROMPTS[:1], progress=False)  # another request
        ask(at(stub, tmp_path), [PROMPTS[0], PROMPTS[0]], progress=False)
        assert len(stub.requests) == 5
    # No request is left to send: neither a server nor a key is needed.
    endpoint = Endpoint(stub.url, "teacher", tmp_path / "cache", key_variable="ABSENT")
    assert texts(ask(endpoint, PROMPTS, progress=False)) == texts(again)


def test_a_killed_run_keeps_what_was_answered(tmp_path):
    def three_then_down(number, messages):
        return echo(number, messages) if number <= 3 else (503, {}, b"down")

    with StubEndpoint(three_then_down) as stub:
        endpoint = at(stub, tmp_path, concurrency=1, max_retries=1)
        with pytest.raises(PipelineError, match=r"asked 2 times: status 503: down.*run again"):
            ask(endpoint, PROMPTS, progress=False)
        stub._answer = echo
        assert len(ask(endpoint, PROMPTS, progress=False)) == 4
    assert len(stub.requests) == 3 + 2 + 1


def test_too_many_requests_and_server_errors_are_asked_again(tmp_path):
    replies = [(429, {"Retry-After": "0.05"}, b"slow down"), (500, {}, b""), (502, {}, b"<html>")]

    def rough(number, messages):
        return replies[number - 1] if number <= 3 else echo(number, messages)

    with StubEndpoint(rough) as stub:
        begin = time.monotonic()
        found = ask(at(stub, tmp_path), PROMPTS[:1], progress=False)
    assert texts(found) == [["to question 0"]] and len(stub.requests) == 4
    assert time.monotonic() - begin > 0.05 + 0.02 + 0.04  # Retry-After, then 0.01·2 and 0.01·4


def test_a_slow_endpoint_is_given_up_and_asked_again(tmp_path):
    def first_slow(number, messages):
        return slowly(0.5 if number == 1 else 0, echo(number, messages))

    with StubEndpoint(first_slow) as stub:
        endpoint = at(stub, tmp_path, timeout_seconds=0.1)
        assert texts(ask(endpoint, PROMPTS[:1], progress=False)) == [["to question 0"]]
        assert len(stub.requests) == 2
        stub._answer = lambda number, messages: slowly(0.3, echo(number, messages))
        with pytest.raises(PipelineError, match="no reply in time"):
            ask(at(stub, tmp_path, timeout_seconds=0.1, max_retries=0), PROMPTS[1:2])


GARBAGE = [b"<html>ok</html>", b"{}", b'{"choices": []}', b"\xff\xfe", b"null", b"[" * 100_000]
GARBAGE += [completion("half a surrogate pair: \ud800")[2]]


@pytest.mark.parametrize("body", GARBAGE)
def test_garbage_is_asked_for_once_more_and_then_named(body, tmp_path):
    def garbage(number, messages):
        if messages[-1]["content"] == "question 1":
            return 200, {}, body
        return echo(number, messages)

    with StubEndpoint(garbage) as stub:
        found = ask(at(stub, tmp_path), PROMPTS[:3], progress=False)
    assert texts(found) == [["to question 0"], [None], ["to question 2"]]
    assert found[1][0].reason == MALFORMED and "not a chat completion" in found[1][0].detail
    assert len(stub.requests) == 4
    assert len(list((tmp_path / "cache").iterdir())) == 2  # garbage is not kept


def test_a_reply_without_text_is_malformed(tmp_path):
    with StubEndpoint(lambda *_: completion(None)) as stub:
        [[answer]] = ask(at(stub, tmp_path), PROMPTS[:1], progress=False)
    assert (answer.text, answer.reason) == (None, MALFORMED)


def test_one_request_that_is_refused_does_not_stop_the_others(tmp_path):
    def long(number, messages):
        if messages[-1]["content"] == "question 1":
            return 400, {}, b'{"error": "too long"}'
        return echo(number, messages)

    with StubEndpoint(long) as stub:
        found = ask(at(stub, tmp_path), PROMPTS[:2], progress=False)
    assert found[1][0].reason == REFUSED and "status 400" in found[1][0].detail
    assert texts(found)[0] == ["to question 0"] and len(stub.requests) == 2


@pytest.mark.parametrize("status", [401, 403, 404])
def test_a_wrong_key_or_address_stops_at_once_and_the_key_is_not_shown(status, tmp_path):
    with StubEndpoint(lambda *_: (status, {}, f"bad key {SECRET}".encode())) as stub:
        endpoint = at(stub, tmp_path, key_variable=KEY, concurrency=1)
        with pytest.raises(PipelineError, match=f"status {status}: bad key <key>") as error:
            ask(endpoint, PROMPTS, progress=False)
    assert len(stub.requests) <= 2 and SECRET not in str(error.value)


@pytest.mark.parametrize("said", [completion(f"Bearer {SECRET}")[2], SECRET.encode()])
def test_a_key_that_is_repeated_is_not_kept(said, tmp_path):
    with StubEndpoint(lambda *_: (200, {}, said)) as stub:
        [[answer]] = ask(at(stub, tmp_path, key_variable=KEY), PROMPTS[:1], progress=False)
    kept = "".join(p.read_text() for p in tmp_path.rglob("*.json"))
    assert "<key>" in (answer.text or answer.detail) and SECRET not in f"{answer} {kept}"


@pytest.mark.parametrize("key", ["sk-a\nsk-secret", "sk-secret€"])
def test_a_key_that_no_header_can_hold_is_not_shown(key, tmp_path, monkeypatch):
    monkeypatch.setenv(KEY, key)
    with pytest.raises(PipelineError, match="holds no API key") as error:
        ask(Endpoint("http://127.0.0.1:1", "m", tmp_path, key_variable=KEY), PROMPTS)
    assert "secret" not in str(error.value)


def test_an_error_that_breaks_off_is_asked_again(tmp_path):
    broken = (500, {"Transfer-Encoding": "chunked"}, b"5\r\nab")

    def first_broken(number, messages):
        return broken if number == 1 else echo(number, messages)

    with StubEndpoint(first_broken) as stub:
        found = ask(at(stub, tmp_path, timeout_seconds=0.3), PROMPTS[:1], progress=False)
    assert texts(found) == [["to question 0"]] and len(stub.requests) == 2


@pytest.mark.parametrize("status", [302, 307])  # urllib itself follows the former
def test_redirects_are_not_followed(status, tmp_path):
    with StubEndpoint(echo) as other:
        moved = (status, {"Location": f"{other.url}/chat/completions"}, b"")
        with (
            StubEndpoint(lambda *_: moved) as stub,
            pytest.raises(PipelineError, match=f"status {status}"),
        ):
            ask(at(stub, tmp_path, key_variable=KEY), PROMPTS[:1], progress=False)
    assert not other.requests


def test_so_many_at_once_and_no_more(tmp_path):
    with StubEndpoint(lambda n, m: slowly(0.03, echo(n, m))) as stub:
        ask(at(stub, tmp_path, concurrency=3), PROMPTS, 5, progress=False)
    assert stub.most_at_once == 3 and len(stub.requests) == 20
    assert not [t for t in threading.enumerate() if "ThreadPoolExecutor" in t.name]


def test_nobody_there(tmp_path):
    with StubEndpoint(echo) as stub:
        url = stub.url
    endpoint = Endpoint(url, "m", tmp_path, max_retries=1, backoff_seconds=0.01)
    with pytest.raises(PipelineError, match=r"asked 2 times: no connection"):
        ask(endpoint, PROMPTS[:1], progress=False)


def test_a_key_that_is_not_set(tmp_path, monkeypatch):
    monkeypatch.delenv(KEY)
    with pytest.raises(PipelineError, match=f"{KEY}.* is not set"):
        ask(Endpoint("http://127.0.0.1:1", "m", tmp_path, key_variable=KEY), PROMPTS)


def test_a_damaged_cache_is_named(tmp_path):
    with StubEndpoint(echo) as stub:
        ask(at(stub, tmp_path), PROMPTS[:1], progress=False)
        [file] = (tmp_path / "cache").iterdir()
        file.write_text("{")
        with pytest.raises(PipelineError, match=rf"{file.name}: damaged; remove it"):
            ask(at(stub, tmp_path), PROMPTS[:1], progress=False)


@pytest.mark.parametrize(
    ("url", "message"),
    [
        ("file:///etc/passwd", "http:// or https://"),
        ("localhost:8000/v1", "http:// or https://"),
        ("http://", "http:// or https://"),
        ("https://me:secret@host/v1", "no key and no query"),
        ("https://host/v1?api-key=secret", "no key and no query"),
        ("https://host/v1/chat/completions", "without /chat/completions"),
        ("http://host:secret/v1", "no address"),
        ("http://host:99999/v1", "no address"),
        ("http://[::1/v1", "no address"),
        ("http://a..b/v1", "no address"),
        ("http://host/v 1", "no address"),
    ],
)
def test_addresses_that_cannot_be(url, message, tmp_path):
    with pytest.raises(PipelineError, match=message) as error:
        Endpoint(url, "m", tmp_path)
    assert "secret" not in str(error.value)


# ---- as a teacher ----------------------------------------------------------------------------


def wrong(response, name):
    return Prediction([{"role": "user", "content": "3 + 4?"}], response, "It is 7.", {"id": name})


def is_seven(row, response):
    return response.strip().endswith("7")


def test_corrections_from_an_endpoint(tmp_path):
    mark = "First wrong step: 8\nCorrected solution:\n"
    samples = {"a": ["The sum is 7", "3 + 4 = 7"], "b": ["3 + 4 = 6"] * 2}
    seen: dict[str, int] = {}

    def teach(number, messages):
        text = messages[0]["content"]
        assert "3 + 4?" in text and "It is 7." in text
        name = next(n for n in "abcd" if f"8 {n}" in text)
        seen[name] = seen.get(name, 0) + 1
        if name in samples:
            return completion(mark + samples[name][seen[name] - 1])
        return completion(None) if name == "c" else completion("7")  # d: without the mark

    with StubEndpoint(teach) as stub:
        teacher = RemoteTeacher(at(stub, tmp_path, concurrency=1), tiny_tokenizer(), 2)
        predictions = [wrong(f"3 + 4 = 8 {name}", name) for name in "abcd"]
        found = correct_predictions(
            predictions, "endpoint", is_correct=is_seven, teacher=teacher, progress=False
        )
        assert found.texts == ["3 + 4 = 7", None, None, None]
        assert found.counts == {
            "predictions": 4, "accepted": 1, "correction is wrong": 1, MALFORMED: 1,
            "no correction": 1,
        }  # fmt: skip
        assert [(f["id"], f["reason"]) for f in found.failures] == [("c", MALFORMED)] * 2
        json.dumps(found._asdict())
        with pytest.raises(DataError, match=r"1 x malformed reply.*; the endpoint said no text"):
            correct_predictions(
                predictions[2:3], "endpoint", is_correct=is_seven, teacher=teacher, progress=False
            )
        with pytest.raises(TrainingError, match="'endpoint' need its teacher and a checker"):
            correct_predictions(predictions, "endpoint", teacher=teacher)
        with pytest.raises(TrainingError, match="'model' need its teacher"):
            correct_predictions(predictions, "model", is_correct=is_seven, teacher=teacher)


def allo_run(folder, model, url, **changes):
    """An ALLO run up to its corrections: one wrong response waits."""
    settings = dict(TINY)
    settings["token_rewards"] = TokenRewardSettings(
        kind="edit", teacher="endpoint", teacher_url=url, teacher_model="m",
        teacher_key_variable=KEY, teacher_max_new_tokens=9, teacher_num_samples=2,
    )  # fmt: skip
    settings |= {"sft": SFTSettings(enabled=False)} | changes
    machine = settings.pop("run")
    run = AlloRun(folder, str(model), machine=machine, merge_model=False, **settings)
    row = {"id": "q/0", "prompt": [{"role": "user", "content": "3 + 4?"}], "final_answer": "7"}
    row |= {"target": "The answer is: 7", "response": "The answer is: 8"}
    (folder / "pairs").mkdir(parents=True)
    write_jsonl(folder / "pairs" / "wrong.jsonl", [row])
    return run


def test_the_stage_of_allo_asks_and_keeps_answers_outside_its_folder(tiny_llama_dir, tmp_path):
    text = "Corrected solution: The answer is: 7"
    with StubEndpoint(lambda *_: completion(text)) as stub:
        run = allo_run(tmp_path / "run", tiny_llama_dir, stub.url)
        for attempt in ("killed", "again"):
            folder = tmp_path / attempt
            folder.mkdir()
            allo_rewards.correct(run, folder)
            written = json.loads((folder / "corrections.json").read_text("utf-8"))
            assert written["texts"] == ["The answer is: 7"] and written["failures"] == []
    assert len(stub.requests) == 2  # two samples, asked for by the first attempt alone
    assert stub.requests[0][2]["max_tokens"] == 9
    kept = [p.read_text() for p in tmp_path.rglob("*") if p.is_file()]
    assert not any(SECRET in each for each in kept)


def test_what_cannot_work_is_said_before_the_first_stage(tiny_llama_dir, tmp_path, monkeypatch):
    run = allo_run(tmp_path / "a", tiny_llama_dir, "http://127.0.0.1:1/v1")
    stages_of(run)
    monkeypatch.delenv(KEY)
    with pytest.raises(PipelineError, match=f"{KEY}.* is not set"):
        stages_of(run)
    pairs = DataSettings("preference", (str(tmp_path / "x.jsonl"),))
    run = allo_run(tmp_path / "b", tiny_llama_dir, "http://127.0.0.1:1/v1", data=pairs)
    with pytest.raises(PipelineError, match="rewrites that can be judged"):
        stages_of(run)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"teacher": "endpoint", "teacher_model": "m"}, "needs token_rewards.teacher_url"),
        ({"teacher": "endpoint", "teacher_url": "http://h/v1"}, "teacher_model"),
        (
            {"teacher": "endpoint", "teacher_url": "h/v1", "teacher_model": "m"},
            "must begin with http",
        ),
        ({"teacher_url": "http://h/v1"}, "for teacher: endpoint alone"),
        ({"teacher_key_variable": "K"}, "for teacher: endpoint alone"),
        ({"teacher_concurrency": 0}, "teacher_concurrency is 0"),
        ({"teacher_timeout_seconds": 0.0}, "above 0"),
    ],
)
def test_settings_that_cannot_be(settings, message):
    with pytest.raises(PipelineError, match=message):
        TokenRewardSettings(**settings)


@pytest.mark.usefixtures("_unrendered")
def test_a_whole_run_with_corrections_from_an_endpoint(tiny_llama_dir, tmp_path):
    """From the settings to the delta; a second run asks nothing."""

    def teach(number, messages):
        solution = messages[0]["content"].split("Right solution:\n")[1].split("\n\nA student's")[0]
        return completion(f"First wrong step: all\nCorrected solution:\n{solution}")

    corrections = {"kind": "binary", "teacher": "endpoint", "teacher_model": "m"}
    corrections |= {"teacher_key_variable": KEY, "max_length": 384}
    with StubEndpoint(teach) as stub:
        rewards = corrections | {"teacher_url": stub.url}
        small = {"token_rewards": rewards, "sft": {"enabled": False}, "sample": {"num_samples": 1}}
        small["data"] = {"train_rows": 3, "held_out_rows": 2}
        tiny_allo(tiny_llama_dir, tmp_path / "run", **small)
        asked = len(stub.requests)
        tiny_allo(tiny_llama_dir, tmp_path / "run", **small)
    written = (tmp_path / "run" / "corrections" / "corrections.json").read_text("utf-8")
    counts = json.loads(written)["counts"]
    assert counts == {"predictions": asked, "accepted": asked} and asked == len(stub.requests) > 0
    assert (tmp_path / "run" / "export" / "delta.safetensors").is_file()
    kept = [p.read_bytes() for p in tmp_path.rglob("*") if p.is_file()]
    assert not any(SECRET.encode() in each for each in kept)
