"""What makes a typed row a bad one, before it is tokenised."""

from __future__ import annotations

import re
from typing import Any

from lit_align.data.bad_rows import BadRowError
from lit_align.data.schema import (
    Content,
    Message,
    PreferenceRow,
    Row,
    SFTRow,
    UnlearningRow,
    is_messages,
    texts_in,
)

# Tab, line feed and carriage return are text; the other C0 and C1 controls and DEL are damage.
CONTROL = re.compile(r"[\x00-\x08\x0b\x0c\x0e-\x1f\x7f-\x9f]")
SURROGATE = re.compile(r"[\ud800-\udfff]")
IDENTICAL = "chosen and rejected are identical"
FP32_MAX = 3.4028234663852886e38
LONGEST_TEXT = 1 << 24  # characters
FIRST_ROLES = ("system", "developer")


def check_row(row: Row) -> None:
    """Raise BadRowError where the row cannot be used; tokens are checked later."""
    responses, weights = _responses(row)
    _check_content("prompt", row.prompt)
    for response in responses:
        _check_content("response", response)
        if _kind(response) != _kind(row.prompt):
            raise BadRowError("prompt and response are of different kinds")
        if is_messages(row.prompt):
            _check_roles(row.prompt, response)  # type: ignore[arg-type]
    for values in weights:
        _check_weights(values)
    if isinstance(row, PreferenceRow) and row.chosen == row.rejected:
        raise BadRowError(IDENTICAL)


def _responses(row: Row) -> tuple[list[Content], list[Any]]:
    if isinstance(row, PreferenceRow):
        weights = [row.chosen_token_weights, row.rejected_token_weights]
        return [row.chosen, row.rejected], weights
    assert isinstance(row, SFTRow | UnlearningRow)
    return [row.response], [row.token_weights]


def _kind(content: Content) -> str:
    if isinstance(content, str):
        return "text"
    return "messages" if is_messages(content) else "token_ids"


def _check_content(part: str, content: Any) -> None:
    empty = "no response" if part == "response" else "empty prompt"
    if isinstance(content, str):
        check_text(content, empty)
    elif not isinstance(content, list):
        raise BadRowError(f"{part} is neither text, messages nor token ids", type(content).__name__)
    elif not content:
        raise BadRowError(empty)
    elif is_messages(content):
        for message in content:
            _check_message(message, empty)
    elif any(type(token_id) is not int for token_id in content):
        raise BadRowError(f"{part} is neither text, messages nor token ids")


def _check_message(message: Any, empty: str) -> None:
    if not isinstance(message, dict) or not isinstance(message.get("role"), str):
        raise BadRowError("a message without a role")
    if not isinstance(message.get("content"), str):
        raise BadRowError("a message whose content is not text", message["role"])
    if extra := sorted(k for k, v in message.items() if v and k in ("tool_calls", "tools")):
        raise BadRowError("tool calls are not supported", ", ".join(extra))
    for text in texts_in(message):  # a template may show more than the content
        check_text(text, None)
    may_be_empty = message["role"] in FIRST_ROLES
    check_text(message["content"], None if may_be_empty else empty)


def check_text(text: str, empty: str | None) -> None:
    """Raise BadRowError for damaged text.

    Args:
        text: of a row.
        empty: the reason where it is blank; None where it may be.
    """
    if len(text) > LONGEST_TEXT:  # minutes, and many times its size, to tokenise
        raise BadRowError("longer than 16 million characters", f"{len(text)}")
    if empty and not text.strip():
        raise BadRowError(empty)
    if found := SURROGATE.search(text):
        raise BadRowError("lone surrogate", f"character {found.start()}")
    if found := CONTROL.search(text):
        raise BadRowError("control character", f"U+{ord(found[0]):04X}, character {found.start()}")


def _check_roles(prompt: list[Message], response: list[Message]) -> None:
    """(system) user assistant user ... and then one assistant message."""
    roles = [message["role"] for message in prompt]
    turns = roles[1:] if roles[0] in FIRST_ROLES else roles
    expected = ["user" if i % 2 == 0 else "assistant" for i in range(len(turns))]
    if [m["role"] for m in response] != ["assistant"] or turns != expected or len(turns) % 2 == 0:
        shown = " ".join(roles + ["|"] + [message["role"] for message in response])
        raise BadRowError("roles out of order", shown)


def _check_weights(weights: Any) -> None:
    if weights is None:
        return
    if not isinstance(weights, list) or not all(
        isinstance(w, int | float) and not isinstance(w, bool) and abs(w) <= FP32_MAX
        for w in weights
    ):
        raise BadRowError("token_weights is not a list of finite numbers")
    if any(w < 0 for w in weights):
        raise BadRowError("token_weights below 0", str(min(weights)))
    if weights and not any(weights):
        raise BadRowError("token_weights are all 0")
