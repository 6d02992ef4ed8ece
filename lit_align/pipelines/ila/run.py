"""One ILA run: its settings, its data sets and rankings, and where its outputs stand."""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Iterable
from pathlib import Path

from lit_align.callbacks.milestones import milestone_name
from lit_align.errors import PipelineError
from lit_align.language_model import resolve_model
from lit_align.pipelines.ila.settings import (
    ILADataSettings,
    Stage1Settings,
    Stage2Settings,
    UseSettings,
)
from lit_align.pipelines.settings import RunSettings
from lit_align.pipelines.variants import CHANGE_FOLDER, TuneData

SCORES_FILE = "scores.json"
TRANSFERRED = "transferred"
LAST = "last"
MOST_LETTERS = 24  # of a data set's name inside a stage's name
# Names that variants of their own begin with: no data set and no ranking is called so.
RESERVED = (TRANSFERRED, "shared", "random_1", "random_2", "first", "last")


@dataclasses.dataclass(frozen=True)
class Ranking:
    """One ranking of the layers.

    Attributes:
        name: of the report.
        file: its scores.
        stage: that writes them; None: they were found before.
    """

    name: str
    file: Path
    stage: str | None = None


@dataclasses.dataclass(frozen=True)
class ILARun:
    """Settings of all stages; every stage is a function of a run and its own folder.

    Attributes:
        output: folder of the run; stage `x` writes into `output / "x"`.
        model: local folder, hub id or alias.
        data: rows to fine-tune on and to search with.
        stage1: the fine-tuning whose change is looked at.
        stage2: the gates.
        use: the variants.
        machine: precision, device, seed.
    """

    output: Path
    model: str
    data: ILADataSettings
    stage1: Stage1Settings
    stage2: Stage2Settings
    use: UseSettings
    machine: RunSettings

    def __post_init__(self) -> None:
        if not self.data.train_files:
            raise PipelineError("data.train_files is empty: name at least one file")
        given = self.stage1.change
        if not (self.stage1.enabled or self.use.scores or self.use.transfer):
            raise PipelineError(
                "there is no ranking to use: leave stage1.enabled on, or give use.scores or "
                "use.transfer"
            )
        if given and len(given) != len(self.datasets):
            raise PipelineError(
                f"stage1.change names {len(given)} folder(s) for {len(self.datasets)} data set(s): "
                f"one each, in the order {', '.join(self.datasets)}"
            )
        absent = set(self.stage2.milestones) - set(self.milestones)
        if absent:
            raise PipelineError(
                f"stage2.milestones asks for {sorted(absent)}, and stage 1 keeps "
                f"{self.milestones or 'the last change alone: set stage1.until milestones'}"
            )

    @property
    def base(self) -> Path:
        """The model's folder."""
        return resolve_model(self.model)

    # ---- data --------------------------------------------------------------------------------

    @property
    def files(self) -> dict[str, str]:
        """Short name → file, of every file that is trained on."""
        return _named([*self.data.train_files, *self.data.search_files])

    @property
    def datasets(self) -> dict[str, tuple[str, ...]]:
        """Data set that layers are ranked on → short names of its files."""
        names = {file: name for name, file in self.files.items()}
        if self.data.search_files:
            return {names[file]: (names[file],) for file in self.data.search_files}
        together = tuple(names[file] for file in self.data.train_files)
        return {together[0] if len(together) == 1 else "train": together}

    def search_data(self, dataset: str) -> TuneData:
        """The train rows of a data set, without validation rows."""
        return self._prepared(self.datasets[dataset], ())

    def tune_data(self) -> TuneData:
        """The rows that every variant is trained and compared on."""
        names = {file: name for name, file in self.files.items()}
        validation = (str(self.output / "data" / "validation.jsonl"),)
        return self._prepared((names[file] for file in self.data.train_files), validation)

    def _prepared(self, names: Iterable[str], validation: tuple[str, ...]) -> TuneData:
        return TuneData(
            train_files=tuple(str(self.output / "data" / name / "train.jsonl") for name in names),
            validation_files=validation,
            validation_fraction=0.0,
            max_length=self.data.max_length,
            objective=self.data.objective,
            seed=self.data.seed,
        )

    # ---- changes and rankings ----------------------------------------------------------------

    @property
    def milestones(self) -> tuple[float, ...]:
        """The milestones that stage 1 keeps; none: its last change alone."""
        kept = self.stage1.until == "milestones" and not self.stage1.change
        return self.stage1.milestones if kept else ()

    def change(self, dataset: str, milestone: str) -> Path:
        """The folder of a change that is ranked."""
        if self.stage1.change:
            return Path(self.stage1.change[list(self.datasets).index(dataset)])
        folder = self.output / f"change_{dataset}"
        return folder / (CHANGE_FOLDER if milestone == LAST else f"milestones/{milestone}")

    @property
    def fine_tuned(self) -> tuple[str, ...]:
        """The data sets that stage 1 trains on."""
        return tuple(self.datasets) if self.stage1.enabled and not self.stage1.change else ()

    def asked(self) -> tuple[str, ...]:
        """The milestones of each data set that are ranked, by name, the last one last."""
        shares = self.stage2.milestones or self.milestones[-1:]
        return tuple(milestone_name(share) for share in sorted(shares)) or (LAST,)

    def found(self) -> dict[str, list[Ranking]]:
        """Data set → its rankings, by milestone, the last one last."""
        listed: dict[str, list[Ranking]] = {}
        for dataset in self.datasets if self.stage1.enabled else ():
            for milestone in self.asked():
                stage = f"scores_{dataset}_{milestone}"
                name = dataset if milestone == LAST else f"{dataset}, {milestone} %"
                ranking = Ranking(name, self.output / stage / SCORES_FILE, stage)
                listed.setdefault(dataset, []).append(ranking)
        return listed

    def rankings(self) -> dict[str, Ranking]:
        """The rankings that are used, by short name: each data set's last, then given files."""
        last = {dataset: rankings[-1] for dataset, rankings in self.found().items()}
        given = _named(self.use.scores, taken=last)
        return last | {name: Ranking(name, Path(file)) for name, file in given.items()}

    def every_ranking(self) -> list[Ranking]:
        """All of them: of every milestone, and those found before."""
        found = [ranking for rankings in self.found().values() for ranking in rankings]
        return [*found, *(r for r in self.rankings().values() if r.stage is None)]

    def tune_folders(self, variant: str) -> list[Path]:
        """The folders of a variant's trainings, by seed."""
        seeds = range(self.machine.seed, self.machine.seed + self.use.seeds)
        return [self.output / f"tune_{variant}_{seed}" for seed in seeds]


def _named(files: Iterable[str], taken: Iterable[str] = ()) -> dict[str, str]:
    """Short name → file; files of the same name, or of one that is taken, are numbered."""
    used = {name.lower() for name in (*RESERVED, *taken)}
    named: dict[str, str] = {}
    for file in dict.fromkeys(files):
        stem = re.sub(r"[^A-Za-z0-9]+", "_", Path(file).stem).strip("_")[:MOST_LETTERS] or "rows"
        name, number = stem, 1
        while name.lower() in used:
            number += 1
            name = f"{stem}_{number}"
        used.add(name.lower())
        named[name] = file
    return named
