"""Names in pictures, as they are: matplotlib would read formulas in them, or fail to write them."""

import textwrap

from lit_align.report.tables import printable

MAX_LABEL = 60


def literal(text: str) -> str:
    r"""A text on one line that matplotlib draws letter by letter.

    Dollar signs begin no formula, what cannot be printed (line breaks, lone surrogates, control
    characters) becomes a space, and the middle of a long text is left out.

    >>> literal("cost $x$"), literal("a" * 70)[25:35]
    ('cost \\$x\\$', 'aaa...aaaa')
    """
    line = printable(text)
    if len(line) > MAX_LABEL:
        half = (MAX_LABEL - 3) // 2
        line = f"{line[:half]}...{line[-half:]}"
    return line.replace("$", r"\$")


def paragraph(text: str, width: int) -> list[str]:
    """A text as lines of at most `width` letters, drawn letter by letter as in `literal`."""
    return [line.replace("$", r"\$") for line in textwrap.wrap(printable(text), width)]
