"""Chat completions of an OpenAI-compatible endpoint: some at once, and each paid for once."""

from __future__ import annotations

import concurrent.futures
import threading
from collections.abc import Sequence
from pathlib import Path

from tqdm.auto import tqdm

from lit_align.pipelines.rewards.endpoint_request import (
    Answer,
    Endpoint,
    Messages,
    Request,
    check_url,
)

__all__ = ["Answer", "Endpoint", "ask", "check_url"]


def ask(
    endpoint: Endpoint, prompts: Sequence[Messages], num_samples: int = 1, *, progress: bool = True
) -> list[list[Answer]]:
    """Answers to each prompt, `num_samples` each, in order; from the cache where they are there.

    A request that the endpoint refuses, or twice answers with something that is no chat completion,
    has a reason in place of a text; such ones are not cached.

    Raises:
        PipelineError: no key, wrong key or address, or no answer after all retries. The answers so
            far are in the cache: run again to go on.
    """
    work = [(prompt, sample) for prompt in prompts for sample in range(num_samples)]
    requests = [Request(endpoint, messages, sample) for messages, sample in work]
    waiting = [request for request in requests if not request.path.exists()]
    if waiting:
        endpoint.cache.mkdir(parents=True, exist_ok=True)
        known = len(requests) - len(waiting)
        print(f"{len(waiting)} requests to {endpoint.address} ({known} answered from the cache)")
    answers = _answers(waiting, endpoint, progress)
    flat = iter([answers.get(r.path) or Answer(r.cached()) for r in requests])
    return [[next(flat) for _ in range(num_samples)] for _ in prompts]


def _answers(waiting: Sequence[Request], endpoint: Endpoint, progress: bool) -> dict[Path, Answer]:
    """Answers by the request's place in the cache; equal requests are sent once."""
    key, stopping = endpoint.key() if waiting else None, threading.Event()
    distinct = {request.path: request for request in waiting}
    answers: dict[Path, Answer] = {}
    bar = tqdm(total=len(distinct), desc="asking", unit="request", disable=not progress)
    with bar, concurrent.futures.ThreadPoolExecutor(endpoint.concurrency) as pool:
        futures = {pool.submit(r.send, key, stopping): path for path, r in distinct.items()}
        try:
            for future in concurrent.futures.as_completed(futures):
                answers[futures[future]] = future.result()
                bar.update()
        finally:  # an error, or Ctrl-C: what has not begun does not begin
            stopping.set()
            pool.shutdown(wait=False, cancel_futures=True)
    return answers
