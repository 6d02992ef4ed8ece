"""`lit-align bench training`: pairs, masks, proofs, then rounds of measurements."""

from __future__ import annotations

from collections.abc import Sequence

from lit_align.errors import BenchmarkError
from lit_align.files import write_atomically
from lit_align.pipelines.stage import Stage, run_stages
from lit_align.pipelines.training_bench.job import Result
from lit_align.pipelines.training_bench.methods import METHODS
from lit_align.pipelines.training_bench.pairs import tokens_of_pairs
from lit_align.pipelines.training_bench.plan import OURS_FOLLOWED, Plan
from lit_align.pipelines.training_bench.proofs import Proof
from lit_align.pipelines.training_bench.record import JSON_FILE, Record
from lit_align.pipelines.training_bench.settings import BenchSettings, parser, settings_of
from lit_align.pipelines.training_bench.summary import MARKDOWN_FILE, markdown, table
from lit_align.report.tables import format_table
from lit_align.report.training_figures import PLOT_FILE, TrainingBar, draw_training


def training_command(words: Sequence[str]) -> None:
    """`bench training` with the words of a command line."""
    bench_training(settings_of(vars(parser().parse_args(list(words)))))


def bench_training(settings: BenchSettings) -> None:
    """Run DPO by every method on the same pairs; write `training.json`, `.md` and `.png`.

    Every run is a process of its own. What is done is kept: after an interruption, or with more
    rounds or methods, the rest is run.

    Raises:
        BenchmarkError: lit-align's log-probs or losses are not the others', its run fails, or no
            method can run here. Another method that fails is named and left out.
    """
    _check_environment()
    plan = Plan.of(settings)
    runner = _Runner(plan)
    for stage in plan.preparation():
        runner.run(stage)
    record = Record(plan, tokens_of_pairs(plan.pairs_path))
    _prove(plan, runner, record)
    for number, method, stage in plan.rounds():
        if method.name in plan.left_out:
            continue
        try:
            result = runner.run_worker(stage)
        except BenchmarkError as error:
            if method.is_ours:
                raise
            plan.left_out[method.name] = str(error).splitlines()[-1]
            print(f"  {method.label} is left out: {error}", flush=True)
            continue
        record.add(number, result)
        print(f"  {record.line(method.name)}", flush=True)
    _conclude(plan, record)


class _Runner:
    """Runs stages one after another, what they read before them."""

    def __init__(self, plan: Plan) -> None:
        self.plan = plan
        self.inputs: list[Stage] = []

    def run(self, stage: Stage) -> None:
        """Run a stage that later ones read."""
        self._run(stage)
        self.inputs.append(stage)

    def run_worker(self, stage: Stage) -> Result:
        """Run a stage that nothing reads, and read its result."""
        self._run(stage)
        return Result.read(self.plan.folder(stage))

    def _run(self, stage: Stage) -> None:
        def log(line: str) -> None:
            if line.startswith(f"[{stage.name}]"):
                print(line, flush=True)

        run_stages([*self.inputs, stage], self.plan.output, log=log)


def _prove(plan: Plan, runner: _Runner, record: Record) -> None:
    stages = plan.proofs()
    if not stages:
        return
    results = {name: runner.run_worker(stage) for name, stage in stages.items()}
    (theirs,) = (name for name in results if name != OURS_FOLLOWED)
    record.proof = Proof.of(results[OURS_FOLLOWED], results[theirs])
    record.write()
    print(f"lit-align {record.proof}", flush=True)
    if not record.proof.holds:
        raise BenchmarkError(
            f"lit-align is not measured, it is wrong {record.proof}: {plan.output / JSON_FILE}"
        )


def _conclude(plan: Plan, record: Record) -> None:
    print(format_table(table(record)))
    for name, reason in plan.left_out.items():
        print(f"{METHODS[name].label} is left out: {reason}")
    write_atomically(plan.output / MARKDOWN_FILE, markdown(record).encode())
    bars = [
        TrainingBar(METHODS[s.method].label, s.pairs_per_s, s.peak_mib, METHODS[s.method].is_ours)
        for s in record.summaries()
    ]
    draw_training(bars, plan.output)
    print(", ".join(str(plan.output / name) for name in (JSON_FILE, MARKDOWN_FILE, PLOT_FILE)))


def _check_environment() -> None:
    """Find out before the minutes of timing what would end them."""
    try:
        import matplotlib.figure  # noqa: F401
    except ImportError as error:
        raise BenchmarkError(
            f'the plot needs matplotlib ({error}): pip install "lit-align[report]"'
        ) from error
