"""Chat templates of models: Jinja2, rendered in transformers' sandbox and in limited time."""

from __future__ import annotations

import signal
import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

from jinja2 import TemplateError
from transformers import PreTrainedTokenizerBase

from lit_align.errors import DataError, ModelError
from lit_align.language_model import UNUSABLE

LONGEST_SECONDS = 10.0
# What a template may end with, its author's own words or a mistake in it.
REFUSED: tuple[type[Exception], ...] = (TemplateError, MemoryError, *UNUSABLE)


def render_chat(
    tokenizer: PreTrainedTokenizerBase, messages: Sequence[Any], *, add_generation_prompt: bool
) -> str:
    """A conversation as the tokenizer's template writes it.

    Its code comes with the model and not with the messages, which are values to it: it reaches
    nothing but these, and where signals can be had it is stopped after 10 seconds (not amid one
    operation, of numbers with millions of digits say).

    Raises:
        DataError: the template ends with an error.
        ModelError: it does not end, which other messages would only show again.
    """
    try:
        with _time_limit(LONGEST_SECONDS):
            return tokenizer.apply_chat_template(  # type: ignore[return-value]
                list(messages), tokenize=False, add_generation_prompt=add_generation_prompt
            )
    except TimeoutError as error:
        raise ModelError(f"the chat template does not end: {error}") from error
    except REFUSED as error:
        raise DataError(f"the chat template refuses the messages: {error}") from error


@contextmanager
def _time_limit(seconds: float) -> Iterator[None]:
    """Raise TimeoutError in the block after so long.

    Only in the main thread of a system with alarms (not on Windows), and where nobody else has set
    one: a limit that cannot be kept there is not worth a process a row.
    """
    is_main = threading.current_thread() is threading.main_thread()
    if not is_main or not hasattr(signal, "setitimer") or signal.getitimer(signal.ITIMER_REAL)[0]:
        yield
        return
    before = signal.signal(signal.SIGALRM, _stop)
    try:
        signal.setitimer(signal.ITIMER_REAL, seconds)
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)


def _stop(*_: Any) -> None:
    raise TimeoutError(f"it takes longer than {LONGEST_SECONDS:g} seconds")
