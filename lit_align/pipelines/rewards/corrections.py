"""Right versions of wrong responses: from a column, the gold solution, or a teacher model."""

from __future__ import annotations

import collections
import dataclasses
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Literal, NamedTuple, TypeAlias

from transformers import PreTrainedModel, PreTrainedTokenizerBase

from lit_align.data.encoding import TextEncoder
from lit_align.data.schema import Message
from lit_align.errors import DataError, TrainingError
from lit_align.evaluation import encode_response, generate
from lit_align.pipelines.rewards.edit_distance import align
from lit_align.pipelines.rewards.endpoint import Endpoint, ask
from lit_align.pipelines.rewards.predictions import Prediction

CorrectionSource: TypeAlias = Literal["column", "gold", "model", "endpoint"]
# Whether a response is right for a question's row.
Checker: TypeAlias = Callable[[Mapping[str, Any], str], bool]

NO_CORRECTION = "no correction"
REWRITE_MARK = "Corrected solution:"
TEACHER_PROMPT = """\
Problem:
{problem}

Right solution:
{solution}

A student's solution, which is wrong:
{response}

Find the first wrong step of the student's solution. Keep everything before it word for word, and \
rewrite it and what follows with as few changes as possible, so that the solution becomes right. \
Reply in this form:
First wrong step: <the step>
{mark}
<the whole corrected solution>"""


@dataclasses.dataclass(frozen=True)
class Teacher:
    """A local language model that rewrites, and how it is sampled (see `evaluation.generate`).

    Of `num_samples` rewrites the right one with the fewest edits is taken.
    """

    model: PreTrainedModel
    tokenizer: PreTrainedTokenizerBase
    max_new_tokens: int = 256
    temperature: float = 0.0
    num_samples: int = 1
    batch_size: int = 16
    seed: int = 0


@dataclasses.dataclass(frozen=True)
class RemoteTeacher:
    """A language model behind an endpoint that rewrites.

    Attributes:
        endpoint: where it is asked.
        tokenizer: the policy's, in whose tokens edits are counted.
        num_samples: rewrites a response, of which the right one with the fewest edits is taken.
    """

    endpoint: Endpoint
    tokenizer: PreTrainedTokenizerBase
    num_samples: int = 1


TEACHERS = {"model": Teacher, "endpoint": RemoteTeacher}


class Corrections(NamedTuple):
    """Corrections of some predictions.

    Attributes:
        texts: one for each prediction, in order; None where there is none.
        counts: `predictions`, `accepted`, and how many have none for which reason.
        failures: `id`, `reason` and `detail` of each answer that an endpoint did not give.
    """

    texts: list[str | None]
    counts: dict[str, int]
    failures: list[dict[str, Any]]


class _Candidates(NamedTuple):
    """Texts that may be corrections of a prediction, and why there are none."""

    texts: list[str]
    reason: str = NO_CORRECTION


def correct_predictions(
    predictions: Sequence[Prediction],
    source: CorrectionSource,
    *,
    is_correct: Checker | None = None,
    teacher: Teacher | RemoteTeacher | None = None,
    progress: bool = True,
) -> Corrections:
    """A right version of each wrong response, as far as the source has one.

    - `column`: the column `correction` of the prediction's row; checked where a checker is given.
    - `gold`: the gold solution as it is.
    - `model`: a teacher is told the problem, the gold solution and the response, names the first
      wrong step, keeps everything before it and rewrites the rest (RLMEC, arXiv 2401.06081); taken
      only if the checker finds the rewritten answer right.
    - `endpoint`: the same by a remote teacher.

    Args:
        predictions: wrong ones.
        source: see above.
        is_correct: (row, response) → whether it is right.
        teacher: of `model` (a local one) and `endpoint` (a remote one).
        progress: show a bar while the teacher writes.

    Raises:
        TrainingError: an unknown source, or a teacher's without the teacher or a checker.
        PipelineError: the endpoint cannot be used; see `endpoint.ask`.
        DataError: no prediction gets a correction; names the reasons.
    """
    failures: list[dict[str, Any]] = []
    if source in TEACHERS:
        if is_correct is None or teacher is None or not isinstance(teacher, TEACHERS[source]):
            raise TrainingError(f"corrections by {source!r} need its teacher and a checker")
        candidates, failures = _rewrites(predictions, teacher, progress)
    elif source == "column":
        candidates = [_Candidates([str(p.row.get("correction") or "")]) for p in predictions]
    elif source == "gold":
        candidates, is_correct = [_Candidates([p.solution]) for p in predictions], None
    else:
        raise TrainingError(f"corrections from {source!r}: column | gold | model | endpoint")
    chosen = [_chosen(*pair, is_correct) for pair in zip(predictions, candidates, strict=True)]
    if teacher is not None and source in TEACHERS:
        chosen = [_fewest_edits(p, c, teacher) for p, c in zip(predictions, chosen, strict=True)]
    return _counted(chosen, failures)


def _chosen(
    prediction: Prediction, candidates: _Candidates, is_correct: Checker | None
) -> list[str] | str:
    """The candidates that may be taken, or the reason why there are none."""
    texts = [prediction.in_place(text) for text in candidates.texts if text.strip()]
    if not texts:
        return candidates.reason
    right = [text for text in texts if is_correct is None or is_correct(prediction.row, text)]
    return right or "correction is wrong"


def _fewest_edits(
    prediction: Prediction, found: list[str] | str, teacher: Teacher | RemoteTeacher
) -> list[str] | str:
    """The candidate nearest to the response in tokens; the first of equals."""
    if isinstance(found, str) or len(found) == 1:
        return found
    response = encode_response(teacher.tokenizer, prediction.response)
    distances = [align(response, encode_response(teacher.tokenizer, x)).distance for x in found]
    return [found[distances.index(min(distances))]]


def _counted(chosen: Sequence[list[str] | str], failures: list[dict[str, Any]]) -> Corrections:
    texts = [None if isinstance(found, str) else found[0] for found in chosen]
    reasons = collections.Counter(found for found in chosen if isinstance(found, str))
    accepted = len(chosen) - reasons.total()
    if chosen and not accepted:
        why = ", ".join(f"{count} x {reason}" for reason, count in reasons.most_common())
        said = f"; the endpoint said {failures[0]['detail']}" if failures else ""
        raise DataError(f"no wrong response could be corrected: {why}{said}")
    counts = {"predictions": len(chosen), "accepted": accepted, **reasons}
    return Corrections(texts, counts, failures)


def teacher_prompt(prediction: Prediction) -> list[Message]:
    """What the teacher is asked."""
    text = TEACHER_PROMPT.format(
        problem=prediction.problem,
        solution=prediction.solution.strip(),
        response=prediction.response.strip(),
        mark=REWRITE_MARK,
    )
    return [{"role": "user", "content": text}]


def rewritten_solution(reply: str) -> str:
    """What stands in a teacher's reply after the mark; empty where there is no mark."""
    return reply.partition(REWRITE_MARK)[2].strip()


def _rewrites(
    predictions: Sequence[Prediction], teacher: Teacher | RemoteTeacher, progress: bool
) -> tuple[list[_Candidates], list[dict[str, Any]]]:
    """Each prediction's rewrites, and which answers an endpoint did not give."""
    prompts = [teacher_prompt(prediction) for prediction in predictions]
    if isinstance(teacher, Teacher):
        return _local_rewrites(prompts, teacher, progress), []
    replies = ask(teacher.endpoint, prompts, teacher.num_samples, progress=progress)
    rewrites, failures = [], []
    for prediction, answers in zip(predictions, replies, strict=True):
        texts = [rewritten_solution(answer.text) for answer in answers if answer.text is not None]
        lacking = [answer for answer in answers if answer.text is None]
        row_id = prediction.row.get("id")
        failures += [{"id": row_id, "reason": x.reason, "detail": x.detail} for x in lacking]
        rewrites.append(_Candidates(texts, lacking[0].reason if lacking else NO_CORRECTION))
    return rewrites, failures


def _local_rewrites(
    prompts: Sequence[list[Message]], teacher: Teacher, progress: bool
) -> list[_Candidates]:
    """Rewrites by a local model; none where a text cannot be put before it."""
    encoder = TextEncoder(teacher.tokenizer)
    askable = [i for i, prompt in enumerate(prompts) if not encoder.special_tokens_in(prompt)]
    replies = generate(
        teacher.model,
        teacher.tokenizer,
        [prompts[i] for i in askable],
        max_new_tokens=teacher.max_new_tokens,
        temperature=teacher.temperature,
        num_samples=teacher.num_samples,
        batch_size=teacher.batch_size,
        seed=teacher.seed,
        progress=progress,
    )
    rewrites = [_Candidates([]) for _ in prompts]
    for i, samples in zip(askable, replies, strict=True):
        rewrites[i] = _Candidates([rewritten_solution(reply) for reply in samples])
    return rewrites
