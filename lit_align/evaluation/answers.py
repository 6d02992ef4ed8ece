"""Read the final answer out of a response, and compare it with the right one."""

from __future__ import annotations

import re
from collections.abc import Sequence
from decimal import Decimal

from lit_align.evaluation.prompts import ANSWER_MARK, LETTERS

_NUMBER = r"[-+]?(?:\d[\d,]*)?\.?\d+"
_MARKED_NUMBER = re.compile(re.escape(ANSWER_MARK) + r"\s*\$?\s*(" + _NUMBER + ")", re.IGNORECASE)
_MARKED_TEXT = re.compile(re.escape(ANSWER_MARK) + r"\s*([^\n]*)", re.IGNORECASE)
_LETTER = re.compile(r"\(?([A-Z])\)?(?:[.:)]\s*(.*))?")


def extract_final_answer(response: str, *, last_number: bool = False) -> str | None:
    """The number after the first "The answer is:", normalised; None where there is none.

    The first, since a model that does not stop goes on to problems of its own. Commas, a dollar
    sign before it and a unit after it do not count.

    Args:
        response: a model's text.
        last_number: take the last number of the text where the mark is missing. It makes models
            that were not trained on the form look better, so a report has to say so.
    """
    if found := _MARKED_NUMBER.search(response):
        return normalise_number(found[1])
    if last_number and (numbers := re.findall(_NUMBER, response)):
        return normalise_number(numbers[-1])
    return None


def is_number(text: str) -> bool:
    """Whether an answer can be compared as a number: digits, a sign, commas, a decimal point."""
    return re.fullmatch(_NUMBER, text.strip()) is not None


def normalise_number(text: str) -> str:
    """One spelling a number: "1,200.50" → "1200.5", "7.0" → "7", "-0" → "0"; else the bare text."""
    text = text.strip()
    if not is_number(text):
        return text.lower()
    number = Decimal(text.replace(",", ""))
    return f"{number.normalize():f}" if number else "0"


def extract_choice(response: str, choices: Sequence[str]) -> int | None:
    """Index of the choice that follows "The answer is:", by its text or by its letter.

    Case, punctuation at the end and articles do not count. None where the mark is missing, or what
    follows is not exactly one of the choices.
    """
    found = _MARKED_TEXT.search(response)
    if found is None:
        return None
    said = _bare(found[1])
    matching = [i for i, choice in enumerate(choices) if _bare(choice) == said]
    if matching:
        return matching[0] if len(matching) == 1 else None
    letter = _LETTER.fullmatch(found[1].strip().rstrip("."))
    if letter is None:
        return None
    index = LETTERS.index(letter[1])
    if index >= len(choices) or (letter[2] and _bare(letter[2]) != _bare(choices[index])):
        return None
    return index


def _bare(text: str) -> str:
    """Lower case without an article in front and punctuation around."""
    text = " ".join(text.lower().split()).strip(" .,;:!?\"'*")
    return re.sub(r"^(?:a|an|the) (?=\S)", "", text)
