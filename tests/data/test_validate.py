import pytest

from lit_align.data.bad_rows import BadRowError
from lit_align.data.schema import PreferenceRow, SFTRow, UnlearningRow
from lit_align.data.validate import check_row


def turns(text):
    """Messages from the first letters of their roles."""
    roles = {"s": "system", "u": "user", "a": "assistant", "t": "tool"}
    return [{"role": roles[letter], "content": "x"} for letter in text]


GOOD = [
    SFTRow("q", "a"),
    SFTRow("tab\t line\r\n \u2028 é 😀", "\n a"),
    SFTRow(turns("u"), turns("a")),
    SFTRow(turns("suau"), turns("a")),
    SFTRow([{"role": "system", "content": ""}, *turns("u")], turns("a")),
    SFTRow([1], [2, 3], [0.0, 1e38]),
    PreferenceRow("q", "a", "b"),
    UnlearningRow("q", "a", [0, 1.5]),
]

BAD = [
    (SFTRow("", "a"), "empty prompt"),
    (SFTRow(" \n", "a"), "empty prompt"),
    (SFTRow([], "a"), "empty prompt"),
    (SFTRow("q", " "), "no response"),
    (SFTRow(turns("u"), []), "no response"),
    (SFTRow(turns("u"), [{"role": "assistant", "content": ""}]), "no response"),
    (SFTRow("q", None), "response is neither text, messages nor token ids"),
    (SFTRow([1.5], [2]), "prompt is neither text, messages nor token ids"),
    (SFTRow([True], [2]), "prompt is neither text, messages nor token ids"),
    (SFTRow("q", turns("a")), "prompt and response are of different kinds"),
    (SFTRow(turns("a"), turns("a")), "roles out of order"),
    (SFTRow(turns("uu"), turns("a")), "roles out of order"),
    (SFTRow(turns("ua"), turns("a")), "roles out of order"),
    (SFTRow(turns("us"), turns("a")), "roles out of order"),
    (SFTRow(turns("s"), turns("a")), "roles out of order"),
    (SFTRow(turns("u"), turns("u")), "roles out of order"),
    (SFTRow(turns("u"), turns("aua")), "roles out of order"),
    (SFTRow(turns("ut"), turns("a")), "roles out of order"),
    (SFTRow([{"content": "x"}], turns("a")), "a message without a role"),
    (SFTRow([{"role": "user", "content": None}], turns("a")), "a message whose content is"),
    (
        SFTRow(turns("u"), [{"role": "assistant", "content": "x", "tool_calls": [1]}]),
        "tool calls are not supported",
    ),
    (SFTRow("q\ud800", "a"), "lone surrogate"),
    (SFTRow("q", "a\x00"), "control character"),
    (SFTRow("q", "a\x1b[0m"), "control character"),
    (SFTRow("q", "a\x85"), "control character"),
    (SFTRow([1], [2], ["x"]), "token_weights is not a list of finite numbers"),
    (SFTRow([1], [2], [float("nan")]), "token_weights is not a list of finite numbers"),
    (SFTRow([1], [2], 1.0), "token_weights is not a list of finite numbers"),
    (SFTRow([1], [2], [1e39]), "token_weights is not a list of finite numbers"),
    (SFTRow([1], [2], [10**400]), "token_weights is not a list of finite numbers"),
    (UnlearningRow("q", "a", [0.5, -0.1]), "token_weights below 0"),
    (UnlearningRow("q", "a", [0, 0.0]), "token_weights are all 0"),
    (PreferenceRow("q", "a", "a"), "chosen and rejected are identical"),
    (PreferenceRow([1], [2], [3], None, [float("inf")]), "token_weights is not a list"),
]  # fmt: skip


@pytest.mark.parametrize("row", GOOD)
def test_good_rows(row):
    check_row(row)


@pytest.mark.parametrize(("row", "reason"), BAD)
def test_bad_rows(row, reason):
    with pytest.raises(BadRowError) as caught:
        check_row(row)
    assert caught.value.reason.startswith(reason)
