"""The embedded data: arithmetic word problems with short worked solutions.

Train and held-out problems share neither a template nor a number: what a number leaves when divided
by 7 says in which split's questions it may stand.
"""

from __future__ import annotations

import dataclasses
import random
from collections.abc import Callable
from typing import Literal, TypeAlias, TypedDict

from lit_align.errors import PipelineError

Split: TypeAlias = Literal["train", "held_out"]
Step: TypeAlias = tuple[int, str, int]  # left operand, sign, right operand


class WordProblem(TypedDict):
    """A row; `solution` ends with "The answer is: " and `final_answer`."""

    id: str
    question: str
    solution: str
    final_answer: str


@dataclasses.dataclass(frozen=True)
class Shape:
    """What is calculated, whatever the story.

    Attributes:
        ranges: smallest and largest value of each number in the question.
        steps: the calculation; a 0 as left operand stands for the result of the step before.
        train: stories for the train split.
        held_out: stories for the held-out split.
    """

    ranges: tuple[tuple[int, int], ...]
    steps: Callable[..., list[Step]]
    train: tuple[str, ...]
    held_out: tuple[str, ...]


NAMES = (
    "Tom", "Mia", "Sara", "Ben", "Lily", "Omar", "Anna",
    "Jack", "Nina", "Leo", "Ruth", "Sam", "Ivy", "Paul",
    "Zoe", "Max", "Emma", "Noah", "Kate", "Adam",
)  # fmt: skip
THINGS = (
    "apples", "pencils", "books", "stamps", "marbles", "cards", "shells",
    "coins", "buttons", "stickers", "eggs", "oranges", "flowers", "candles",
    "balloons", "cookies", "beads", "toys", "ribbons", "stones",
)  # fmt: skip

SHAPES = (
    Shape(
        ((3, 60), (3, 60)),
        lambda a, b: [(a, "+", b)],
        (
            "{x} has {a} {things}. {y} gives {x} {b} more. How many {things} does {x} have now?",
            "There are {a} {things} on a table and {b} {things} in a box. "
            "How many {things} are there in all?",
            "{x} found {a} {things} and {y} found {b}. How many did they find together?",
        ),
        ("A shop sold {a} {things} on Monday and {b} on Friday. How many did it sell in total?",),
    ),
    Shape(
        ((20, 90), (3, 60)),
        lambda a, b: [(a, "-", b)],
        (
            "{x} had {a} {things} and lost {b} of them. How many {things} are left?",
            "{x} has {a} {things}. {y} has {b} fewer. How many {things} does {y} have?",
            "A bag holds {a} {things}. {x} takes out {b}. How many {things} stay in the bag?",
        ),
        ("{x} wants {a} {things} and has {b} so far. How many more does {x} need?",),
    ),
    Shape(
        ((2, 9), (2, 12)),
        lambda a, b: [(a, "*", b)],
        (
            "{x} has {a} bags with {b} {things} in each. How many {things} does {x} have?",
            "A box costs {b} dollars. How many dollars do {a} boxes cost?",
            "There are {a} rows of {b} {things}. How many {things} are there?",
        ),
        ("Every day {x} makes {b} {things}. How many does {x} make in {a} days?",),
    ),
    Shape(
        ((6, 96), (2, 9)),
        lambda a, b: [(a, "/", b)],
        (
            "{x} shares {a} {things} equally among {b} friends. How many does each friend get?",
            "{a} {things} are packed in boxes of {b}. How many boxes are needed?",
        ),
        ("{x} puts {a} {things} in {b} equal piles. How many {things} are in one pile?",),
    ),
    Shape(
        ((2, 40), (2, 40), (2, 30)),
        lambda a, b, c: [(a, "+", b), (0, "+", c)],
        (
            "{x} picked {a} {things}, {y} picked {b} and {z} picked {c}. How many in all?",
            "{x} read {a} pages on Monday, {b} on Tuesday and {c} on Sunday. "
            "How many pages did {x} read?",
        ),
        ("A farm has {a} cows, {b} hens and {c} goats. How many animals live on the farm?",),
    ),
    Shape(
        ((5, 50), (5, 40), (2, 40)),
        lambda a, b, c: [(a, "+", b), (0, "-", c)],
        (
            "{x} had {a} {things}, bought {b} more and gave {c} to {y}. "
            "How many {things} does {x} have now?",
            "A bus had {a} riders. At a stop {b} got on and {c} got off. How many are on the bus?",
        ),
        (
            "{x} earned {a} dollars and then {b} dollars, and spent {c}. "
            "How many dollars are left?",
        ),
    ),
    Shape(
        ((20, 90), (3, 40), (2, 40)),
        lambda a, b, c: [(a, "-", b), (0, "+", c)],
        (
            "{x} had {a} {things}, sold {b} of them and then got {c} new ones. "
            "How many {things} does {x} have?",
            "A library had {a} books. {b} were lent and {c} came back. How many books are there?",
        ),
        ("A pond had {a} fish. {b} swam away and {c} came. How many fish are in the pond?",),
    ),
    Shape(
        ((40, 98), (2, 30), (2, 30)),
        lambda a, b, c: [(a, "-", b), (0, "-", c)],
        (
            "{x} baked {a} cookies. {y} ate {b} and {z} ate {c}. How many cookies are left?",
            "A rope is {a} meters long. {x} cuts off {b} meters and then {c} meters. "
            "How many meters remain?",
        ),
        ("{x} had {a} dollars, paid {b} for a hat and {c} for a bag. How many dollars remain?",),
    ),
    Shape(
        ((2, 9), (2, 10), (2, 40)),
        lambda a, b, c: [(a, "*", b), (0, "+", c)],
        (
            "{x} has {a} boxes of {b} {things} and {c} loose ones. How many {things} in all?",
            "{x} buys {a} books for {b} dollars each and a pen for {c} dollars. "
            "How many dollars does {x} pay?",
        ),
        ("{x} runs {b} miles on each of {a} days and {c} miles on Sunday. How many miles in all?",),
    ),
    Shape(
        ((3, 9), (3, 10), (2, 40)),
        lambda a, b, c: [(a, "*", b), (0, "-", c)],
        (
            "{x} bought {a} packs of {b} {things} and used {c}. How many {things} are left?",
            "{a} trees bear {b} pears each. {c} pears fall down. How many are still on the trees?",
        ),
        ("A hall has {a} rows of {b} seats, and {c} seats are taken. How many seats are free?",),
    ),
)  # fmt: skip
HELD_OUT_REMAINDERS = {0, 1, 3}  # 3, 7, 8, 10, 14, ...: small factors and quotients on both sides
OPERATIONS: dict[str, Callable[[int, int], int]] = {
    "+": lambda a, b: a + b,
    "-": lambda a, b: a - b,
    "*": lambda a, b: a * b,
    "/": lambda a, b: a // b,
}


def word_problems(n: int, split: Split = "train", seed: int = 0) -> list[WordProblem]:
    """`n` different problems; the same for the same arguments, on every machine.

    Templates take turns, so that each has its share of any number of rows.

    Raises:
        PipelineError: An unknown split, or more problems than there are.
    """
    if split not in ("train", "held_out"):
        raise PipelineError(f"split is {split!r}: train | held_out")
    # Random(str) hashes the text by SHA-512, which does not vary between runs.
    rng = random.Random(f"{split}/{seed}")
    templates = [(shape, story) for shape in SHAPES for story in getattr(shape, split)]
    turns: list[tuple[Shape, str]] = []
    problems: dict[str, WordProblem] = {}
    for _ in range(20 * n + 1000):
        if len(problems) == n:
            return list(problems.values())
        if not turns:
            turns = rng.sample(templates, len(templates))
        problem = _problem(*turns.pop(), split, rng)
        problem["id"] = f"{split}-{seed}-{len(problems)}"
        problems.setdefault(problem["question"], problem)
    raise PipelineError(f"there are not {n} different problems in the split {split}")


def _problem(shape: Shape, story: str, split: Split, rng: random.Random) -> WordProblem:
    numbers = _numbers(shape, split, rng)
    x, y, z = rng.sample(NAMES, 3)
    values = dict(zip("abc", numbers, strict=False))
    question = story.format(x=x, y=y, z=z, things=rng.choice(THINGS), **values)
    results = _results(shape.steps(*numbers))
    assert results is not None
    lines = [f"{left} {sign} {right} = {result}." for left, sign, right, result in results]
    answer = str(results[-1][-1])
    solution = " ".join([*lines, f"The answer is: {answer}"])
    return {"id": "", "question": question, "solution": solution, "final_answer": answer}


def _numbers(shape: Shape, split: Split, rng: random.Random) -> list[int]:
    """Numbers of the split for which every step of the shape comes out as a whole number > 0."""
    while True:
        numbers = [rng.randint(low, high) for low, high in shape.ranges]
        if any((i % 7 in HELD_OUT_REMAINDERS) != (split == "held_out") for i in numbers):
            continue
        if _results(shape.steps(*numbers)) is not None:
            return numbers


def _results(steps: list[Step]) -> list[tuple[int, str, int, int]] | None:
    """(left, sign, right, result) of each step; None where one is not a whole number > 0."""
    done: list[tuple[int, str, int, int]] = []
    for left, sign, right in steps:
        left = left or done[-1][-1]
        result = OPERATIONS[sign](left, right)
        if result < 1 or (sign == "/" and (left % right or result == 1)):
            return None
        done.append((left, sign, right, result))
    return done
