"""The errors lit-align raises on purpose: one base class, so that callers can catch them all."""


class LitAlignError(Exception):
    """Base of every error that lit-align raises about its input."""

    def __str__(self) -> str:
        """The message, in which what a terminal would act on, or not take, stands as an escape.

        Messages quote names and rows of files that anybody may have written.
        """
        return "".join(
            c if c.isprintable() or c in "\n\t" else c.encode("unicode_escape").decode()
            for c in super().__str__()
        )


class DataError(LitAlignError):
    """Rows of a data file that cannot be used; names file, line and reason."""


class MaskError(LitAlignError):
    """A mask that is damaged, malformed, or belongs to another model."""


class DeltaError(LitAlignError):
    """A delta that is damaged, malformed, or belongs to another model."""


class ModelError(LitAlignError):
    """A model or tokenizer that cannot be found, read, or used as asked."""


class LocalizationError(LitAlignError):
    """Scores that cannot rank parameters: wrong precision, no data, nothing changed."""


class TrainingError(LitAlignError):
    """A run that cannot go on: NaN loss or gradient, or settings that contradict each other."""


class PipelineError(LitAlignError):
    """A pipeline stage whose inputs, outputs or folder are not what the manifest says."""


class BenchmarkError(LitAlignError):
    """A kernel that is not timed: unknown, not runnable here, or wrong."""


# What libraries raise, of themselves or from below, at files that are not what they should be:
# they check few of them before they use them.
LIBRARY_ERRORS: tuple[type[Exception], ...] = (
    OSError,
    ValueError,
    LookupError,
    TypeError,
    AttributeError,
    ArithmeticError,
    AssertionError,
    ImportError,
    RuntimeError,
)
