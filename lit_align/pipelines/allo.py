"""ALLO, end to end (arXiv 2406.12606): warm up, locate, forget, improve."""

from __future__ import annotations

import dataclasses
import json
import shutil
from pathlib import Path
from typing import Any

from lit_align.callbacks import KeyParameterLocalization
from lit_align.compact import apply_delta, export_delta, merge
from lit_align.data import (
    PreferenceDataModule,
    PreferenceRow,
    SFTDataModule,
    SFTRow,
    UnlearningDataModule,
    UnlearningRow,
)
from lit_align.errors import PipelineError
from lit_align.evaluation import evaluate
from lit_align.gguf_alias import ALIAS
from lit_align.language_model import (
    load_language_model,
    load_tokenizer,
    resolve_model,
    save_language_model,
)
from lit_align.localizers import (
    magnitude_scores,
    random_scores,
    weight_change_scores,
)
from lit_align.localizers.weight_change import check_cut
from lit_align.masks import HeadLayout, ParameterMask, conv1d_row_axes, select
from lit_align.modules import MaskedDPO, SupervisedFineTuning, TokenWeightedNPO
from lit_align.pipelines import sampling
from lit_align.pipelines.corrections import Teacher, correct_predictions
from lit_align.pipelines.predictions import Prediction
from lit_align.pipelines.reward_model import RewardModel
from lit_align.pipelines.rewriting import rewriting_rows
from lit_align.pipelines.rows import (
    Row,
    as_response,
    is_right,
    load_rows,
    read_jsonl,
    write_json,
    write_jsonl,
)
from lit_align.pipelines.settings import (
    DataSettings,
    DPOSettings,
    EvaluateSettings,
    ForgetSettings,
    ImproveSettings,
    LocateSettings,
    RunSettings,
    SampleSettings,
    SFTSettings,
    TokenRewardSettings,
)
from lit_align.pipelines.stage import Stage, run_stages
from lit_align.pipelines.summary import summarise
from lit_align.pipelines.token_rewards import weighted_rows
from lit_align.pipelines.training import (
    as_config,
    data_settings,
    inference_device,
    module_settings,
    train,
)

MODEL_FOLDER = "model"
DELTA_FILE = "delta.safetensors"
MASK_FILE = "mask.safetensors"


@dataclasses.dataclass(frozen=True)
class Allo:
    """The stages of one run and where their outputs stand."""

    output: Path
    model: str
    data: DataSettings
    sft: SFTSettings
    sample: SampleSettings
    warm_up: DPOSettings
    locate: LocateSettings
    token_rewards: TokenRewardSettings
    forget: ForgetSettings
    improve: ImproveSettings
    evaluate: EvaluateSettings
    run: RunSettings
    merge_model: bool

    def stages(self) -> list[Stage]:
        """All stages, in order; each reads files and earlier stages alone."""
        base = resolve_model(self.model)
        start = self._start_inputs()
        files = [Path(f) for f in (*self.data.train_files, *self.data.held_out_files)]
        common = as_config(self.run)
        if files:
            files.append(base)  # rows are checked with its tokenizer
        stages = [Stage("data", as_config(self.data), files, self._data)]
        if self.sft.enabled:
            stages.append(Stage("sft", as_config(self.sft) | common, [base, "data"], self._sft))
        drawn: list[Path | str] = ["data"]
        if self.data.kind != "preference":
            stages.append(Stage("sample", as_config(self.sample), [*start, "data"], self._sample))
            drawn = ["sample"]
        warm_up, locate = as_config(self.warm_up) | common, as_config(self.locate) | common
        stages += [
            Stage("pairs", as_config(self.sample), drawn, self._pairs),
            Stage("warm_up", warm_up, [*start, "pairs"], self._warm_up),
            Stage("locate", locate, [*start, "warm_up", "pairs"], self._locate),
            *self._reward_model_stages(common),
            self._token_rewards_stage(common),
        ]
        if self.forget.enabled:
            config = as_config(self.forget) | common
            inputs = [*start, "locate", "token_rewards"]
            stages.append(Stage("forget", config, inputs, self._forget))
        forgotten = ["forget"] if self.forget.enabled else []
        config = as_config(self.improve) | common
        inputs = [*start, "locate", "pairs", *forgotten]
        stages.append(Stage("improve", config, inputs, self._improve))
        config = {"merge_model": self.merge_model}
        stages.append(Stage("export", config, [*start, "improve"], self._export))
        return stages + self._evaluation_stages(base, start)

    # ---- where things stand ------------------------------------------------------------------

    @property
    def start(self) -> Path:
        """The folder that everything after supervised fine-tuning starts from."""
        return self.output / "sft" / MODEL_FOLDER if self.sft.enabled else resolve_model(self.model)

    def _start_inputs(self) -> list[Path | str]:
        """The start, as an input of a stage."""
        return ["sft"] if self.sft.enabled else [self.start]

    def _rows(self, stage: str, name: str) -> list[Row]:
        return read_jsonl(self.output / stage / f"{name}.jsonl")

    def _module_settings(self, settings: Any) -> dict[str, Any]:
        return {"model": str(self.start)} | module_settings(settings, self.run)

    # ---- stages ------------------------------------------------------------------------------

    def _data(self, folder: Path) -> None:
        train_rows, held_out = load_rows(self.data, load_tokenizer(self.model), folder)
        write_jsonl(folder / "train.jsonl", train_rows)
        write_jsonl(folder / "held_out.jsonl", held_out)

    def _sft(self, folder: Path) -> None:
        rows = [
            SFTRow(r["prompt"], as_response(r["prompt"], r["target"]))
            for r in self._rows("data", "train")
        ]
        model = str(resolve_model(self.model))
        self._fine_tune(model, rows, self.sft, folder)

    def _fine_tune(self, model: str, rows: list[SFTRow], settings: Any, folder: Path) -> None:
        module = SupervisedFineTuning(model, **module_settings(settings, self.run))
        data = SFTDataModule.from_rows(
            model, {"train": rows}, **data_settings(settings, self.run, folder)
        )
        train(module, data, settings, self.run, folder)
        self._save_model(module, folder)

    def _save_model(self, module: Any, folder: Path) -> None:
        save_language_model(module.model, module.tokenizer, folder / MODEL_FOLDER)

    def _load(self, folder: Path) -> Any:
        """Model and tokenizer, where the model is fast."""
        model, tokenizer = load_language_model(folder)
        model.to(inference_device(self.run.accelerator))  # type: ignore[arg-type]
        return model, tokenizer

    def _sample(self, folder: Path) -> None:
        model, tokenizer = self._load(self.start)
        sampled = sampling.sample(model, tokenizer, self._rows("data", "train"), self.sample)
        write_jsonl(folder / "sampled.jsonl", sampled)

    def _pairs(self, folder: Path) -> None:
        if self.data.kind == "preference":
            pairs, wrong = sampling.given_pairs(self._rows("data", "train"))
        else:
            pairs, wrong = sampling.make_pairs(self._rows("sample", "sampled"), self.sample)
        write_jsonl(folder / "pairs.jsonl", pairs)
        write_jsonl(folder / "wrong.jsonl", wrong)

    def _pair_data(self, settings: Any, folder: Path) -> PreferenceDataModule:
        rows = [
            PreferenceRow(r["prompt"], r["chosen"], r["rejected"])
            for r in self._rows("pairs", "pairs")
        ]
        return PreferenceDataModule.from_rows(
            str(self.start), {"train": rows}, **data_settings(settings, self.run, folder)
        )

    def _warm_up(self, folder: Path) -> None:
        """Full-parameter DPO: shows which weights change, and is the baseline of the table."""
        module = MaskedDPO(**self._module_settings(self.warm_up), **dpo_settings(self.warm_up))
        data = self._pair_data(self.warm_up, folder)
        train(module, data, self.warm_up, self.run, folder)
        self._save_model(module, folder)

    def _locate(self, folder: Path) -> None:
        """N1 and N2 from one score, so that the smaller lies inside the larger."""
        files = {"n1": self.locate.forget_ratio, "n2": self.locate.improve_ratio}
        if self.locate.method == "gradient":
            self._locate_by_gradient(folder)
            return
        model: Any = load_language_model(self.start)[0]
        scores, granularity = self._scores(model), self.locate.granularity
        for name, ratio in files.items():
            mask = select(
                scores,
                ratio,
                self.locate.scope,
                granularity=granularity,
                row_axes=conv1d_row_axes(model),
                heads=HeadLayout.from_model(model) if granularity == "head" else None,
                base_fingerprint=model.base_fingerprint,
                method=self.locate.method,
            )
            if self.locate.method == "weight_change":
                check_cut(mask, lambda: f"trained in {self.run.precision}")
            mask.save(folder / f"{name}.safetensors")

    def _scores(self, model: Any) -> Any:
        if self.locate.method == "weight_change":
            return weight_change_scores(self.start, self.output / "warm_up" / MODEL_FOLDER)
        if self.locate.method == "random":
            return random_scores(model, self.locate.seed)
        return magnitude_scores(model)

    def _locate_by_gradient(self, folder: Path) -> None:
        """The gradient of the DPO loss at the start: a fit of no steps, for its first batches."""
        module = MaskedDPO(**self._module_settings(self.warm_up), **dpo_settings(self.warm_up))
        callback = KeyParameterLocalization(
            "gradient",
            self.locate.improve_ratio,
            self.locate.granularity,
            self.locate.scope,
            output=str(folder / "n2.safetensors"),
            also={str(folder / "n1.safetensors"): self.locate.forget_ratio},
            num_batches=self.locate.num_batches,
        )
        settings = dataclasses.replace(self.warm_up, max_steps=0)
        data = self._pair_data(settings, folder)
        train(module, data, settings, self.run, folder, [callback])

    def _mask(self, name: str) -> Path:
        return self.output / "locate" / f"{name}.safetensors"

    # ---- token rewards -----------------------------------------------------------------------

    def _reward_model_stages(self, common: dict[str, Any]) -> list[Stage]:
        """Corrections, and the reward model where the weights need one."""
        settings = self.token_rewards
        config = {"teacher": settings.teacher, "teacher_model": settings.teacher_model}
        inputs: list[Path | str] = ["pairs"]
        if settings.teacher == "model":
            inputs.append(self._teacher_folder())
        stages = [Stage("corrections", config, inputs, self._corrections)]
        if settings.kind != "edit":
            config = as_config(settings) | common
            base = settings.reward_model and resolve_model(settings.reward_model)
            inputs = [*([base] if base else self._start_inputs()), "pairs", "corrections"]
            stages.append(Stage("reward_model", config, inputs, self._reward_model))
        return stages

    def _token_rewards_stage(self, common: dict[str, Any]) -> Stage:
        config = as_config(self.token_rewards) | common
        learned = ["reward_model"] if self.token_rewards.kind != "edit" else []
        inputs: list[Path | str] = [*self._start_inputs(), "pairs", "corrections", *learned]
        return Stage("token_rewards", config, inputs, self._token_rewards)

    def _teacher_folder(self) -> Path:
        if self.token_rewards.teacher_model is None:
            raise PipelineError("token_rewards.teacher: model needs token_rewards.teacher_model")
        return resolve_model(self.token_rewards.teacher_model)

    def _reward_base(self) -> Path:
        return resolve_model(self.token_rewards.reward_model or self.start)

    def _wrong(self) -> list[Prediction]:
        return [Prediction.from_row(row) for row in self._rows("pairs", "wrong")]

    def _corrections(self, folder: Path) -> None:
        teacher = None
        if self.token_rewards.teacher == "model":
            teacher = Teacher(*self._load(self._teacher_folder()))
        can_judge = self.data.kind != "preference"
        corrections = correct_predictions(
            self._wrong(),
            self.token_rewards.teacher,
            is_correct=is_right if can_judge else None,
            teacher=teacher,
        )
        write_json(folder / "corrections.json", corrections._asdict())

    def _correction_texts(self) -> list[str | None]:
        path = self.output / "corrections" / "corrections.json"
        return json.loads(path.read_text("utf-8"))["texts"]

    def _reward_model(self, folder: Path) -> None:
        """Fine-tune on the rewriting task."""
        right = []
        if self.token_rewards.identity_rewrites:
            rows = self._rows("pairs", "pairs")
            distinct = {json.dumps([r["prompt"], r["chosen"]]): r for r in rows}.values()
            right = [
                Prediction.from_row(r | {"target": r["chosen"]}, r["chosen"]) for r in distinct
            ]
        task = rewriting_rows(self._wrong(), self._correction_texts(), right)
        self._fine_tune(str(self._reward_base()), task, self.token_rewards, folder)

    def _token_rewards(self, folder: Path) -> None:
        settings = self.token_rewards
        reward_model = None
        if settings.kind != "edit":
            model, tokenizer = self._load(self.output / "reward_model" / MODEL_FOLDER)
            reward_model = RewardModel(model, tokenizer, settings.max_length)
        weighted = weighted_rows(
            self._wrong(),
            self._correction_texts(),
            load_tokenizer(self.start),
            rule=settings.kind,
            threshold=settings.threshold,
            reward_model=reward_model,
        )
        write_jsonl(folder / "weighted.jsonl", weighted.rows)
        write_json(folder / "statistics.json", weighted.statistics)

    # ---- forget, improve ---------------------------------------------------------------------

    def _forget(self, folder: Path) -> None:
        """Token-weighted NPO on wrong responses; only N1 moves."""
        rows = [
            UnlearningRow(r["prompt"], r["response"], r["token_weights"])
            for r in self._rows("token_rewards", "weighted")
        ]
        if self.forget.retain != "none":
            rows += [
                UnlearningRow(r["prompt"], r["chosen"], retain=True)
                for r in self._rows("pairs", "pairs")
            ]
        module = TokenWeightedNPO(
            **self._module_settings(self.forget),
            beta=self.forget.beta,
            loss_type=self.forget.loss_type,
            retain=self.forget.retain,
            retain_weight=self.forget.retain_weight,
            reference="swap" if self.forget.retain == "kl" else "cache",
        )
        data = UnlearningDataModule.from_rows(
            str(self.start), {"train": rows}, **data_settings(self.forget, self.run, folder)
        )
        self._train_masked(module, data, self.forget, folder, "n1")
        export_delta(module.model, folder / DELTA_FILE)

    def _improve(self, folder: Path) -> None:
        """DPO with the noisy-token filter; only N2 moves. Exports N1 ∪ N2 against the start."""
        module = MaskedDPO(
            **self._module_settings(self.improve),
            **dpo_settings(self.improve),
            delta=str(self.output / "forget" / DELTA_FILE) if self.forget.enabled else None,
            filter_side=self.improve.filter_side,
            filter_drop_fraction=self.improve.drop_fraction,
            filter_keep_fraction=self.improve.keep_fraction,
        )
        data = self._pair_data(self.improve, folder)
        self._train_masked(module, data, self.improve, folder, "n2")
        moved = ParameterMask.load(self._mask("n2"))
        if self.forget.enabled:
            moved = moved | ParameterMask.load(self._mask("n1"))
        moved.save(folder / MASK_FILE)
        export_delta(module.model, folder / DELTA_FILE, moved)

    def _train_masked(self, module: Any, data: Any, settings: Any, folder: Path, mask: str) -> None:
        callback = KeyParameterLocalization(mask=str(self._mask(mask)))
        train(module, data, settings, self.run, folder, [callback])

    def _export(self, folder: Path) -> None:
        """The mask N1 ∪ N2 and the delta against the start; the merged model where asked."""
        for name in (MASK_FILE, DELTA_FILE):
            shutil.copyfile(self.output / "improve" / name, folder / name)
        if self.merge_model:
            merge(self.start, folder / DELTA_FILE, folder / MODEL_FOLDER)

    # ---- evaluation --------------------------------------------------------------------------

    def _evaluation_stages(self, base: Path, start: list[Path | str]) -> list[Stage]:
        """One stage a model of the table, so that none is evaluated twice."""
        models: dict[str, tuple[list[Path | str], Path, bool]] = {"base": ([base], base, False)}
        if self.sft.enabled:
            models["sft"] = (["sft"], self.start, False)
        models["dpo"] = (["warm_up"], self.output / "warm_up" / MODEL_FOLDER, False)
        models["allo"] = ([*start, "improve"], self.start, True)
        config = as_config(self.evaluate, self.run)
        return [
            Stage(f"evaluate_{name}", config, [*inputs, "data"], self._evaluator(folder, has_delta))
            for name, (inputs, folder, has_delta) in models.items()
        ]

    def _evaluator(self, model_folder: Path, has_delta: bool) -> Any:
        def run(folder: Path) -> None:
            model, tokenizer = self._load(model_folder)
            if has_delta:
                apply_delta(model, self.output / "improve" / DELTA_FILE)
            metrics = self._evaluate(model, tokenizer, self._rows("data", "held_out"))
            write_json(folder / "metrics.json", metrics)

        return run

    def _evaluate(self, model: Any, tokenizer: Any, rows: list[Row]) -> dict[str, Any]:
        """Metrics over all rows, and the accuracy of each file's rows where there are several."""
        if self.data.kind == "preference":
            rows = [row | {"chosen": row["target"]} for row in rows]
            return evaluate(model, tokenizer, rows, "preference")
        task: Any = "multiple_choice" if "choices" in rows[0] else "exact_answer"
        s = self.evaluate
        metrics = evaluate(
            model,
            tokenizer,
            rows,
            task,
            mode=s.mode if task == "multiple_choice" else "generate",
            max_new_tokens=s.max_new_tokens,
            last_number=s.last_number,
            batch_size=s.batch_size,
        )
        return metrics | {"by_source": accuracy_by_source(rows, metrics["records"])}


def accuracy_by_source(rows: list[Row], records: list[Row]) -> dict[str, dict[str, float]]:
    """N and right answers of each source's rows."""
    table: dict[str, dict[str, float]] = {}
    for row, record in zip(rows, records, strict=True):
        entry = table.setdefault(str(row.get("source", "all")), {"n": 0, "right": 0})
        entry["n"] += 1
        entry["right"] += bool(record["correct"])
    return table


def dpo_settings(settings: DPOSettings) -> dict[str, Any]:
    """The loss's settings, as `MaskedDPO` takes them."""
    names = ("beta", "loss_type", "label_smoothing")
    return {name: getattr(settings, name) for name in names}


def allo(
    output: str = "runs/allo",
    model: str = ALIAS,
    data: DataSettings = DataSettings(),
    sft: SFTSettings = SFTSettings(),
    sample: SampleSettings = SampleSettings(),
    warm_up: DPOSettings = DPOSettings(),
    locate: LocateSettings = LocateSettings(),
    token_rewards: TokenRewardSettings = TokenRewardSettings(),
    forget: ForgetSettings = ForgetSettings(),
    improve: ImproveSettings = ImproveSettings(),
    evaluate: EvaluateSettings = EvaluateSettings(),
    run: RunSettings = RunSettings(),
    merge_model: bool = False,
) -> dict[str, Any]:
    """Run the whole ALLO pipeline; stages that are done are skipped.

    Args:
        output: folder of the run: a folder a stage, the exported mask and delta, the report.
        model: local folder, hub id or alias of the language model to align.
        data: which rows.
        sft: fine-tuning before anything else.
        sample: responses drawn from the model.
        warm_up: the full DPO run that shows which weights change.
        locate: how key neurons are found.
        token_rewards: which tokens of wrong responses are unaligned.
        forget: token-weighted NPO on N1.
        improve: DPO with the token filter on N2.
        evaluate: on the held-out rows.
        run: precision, device, seed.
        merge_model: also write start + delta as an ordinary model folder.

    Returns:
        The table's rows, by model.
    """
    pipeline = Allo(
        Path(output), model, data, sft, sample, warm_up, locate, token_rewards, forget, improve,
        evaluate, run, merge_model,
    )  # fmt: skip
    records = run_stages(pipeline.stages(), output)
    return summarise(pipeline, records)
