"""Generate, score and evaluate: how good a model is, with an interval."""

from lit_align.evaluation.answers import (
    extract_choice,
    extract_final_answer,
    is_number,
    normalise_number,
)
from lit_align.evaluation.generation import generate
from lit_align.evaluation.intervals import wilson_interval
from lit_align.evaluation.prompts import (
    encode_prompt,
    encode_response,
    question_prompt,
    target_response,
)
from lit_align.evaluation.scoring import response_logps
from lit_align.evaluation.tasks import evaluate

__all__ = [
    "encode_prompt",
    "encode_response",
    "evaluate",
    "extract_choice",
    "extract_final_answer",
    "generate",
    "is_number",
    "normalise_number",
    "question_prompt",
    "response_logps",
    "target_response",
    "wilson_interval",
]
