"""The stages of ALLO: each a function of the run and of the folder it writes into."""

from __future__ import annotations

import dataclasses
import shutil
from pathlib import Path
from typing import Any

from lit_align.callbacks import KeyParameterLocalization
from lit_align.compact import export_delta, merge
from lit_align.data import (
    PreferenceDataModule,
    PreferenceRow,
    SFTDataModule,
    SFTRow,
    UnlearningDataModule,
    UnlearningRow,
)
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
from lit_align.pipelines.allo.run import DELTA_FILE, MASK_FILE, AlloRun
from lit_align.pipelines.rows import (
    as_response,
    load_rows,
    write_jsonl,
)
from lit_align.pipelines.run_folder import MODEL_FOLDER
from lit_align.pipelines.settings import (
    DPOSettings,
    TrainSettings,
)
from lit_align.pipelines.training import (
    data_settings,
    module_settings,
    train,
)


def prepare_data(run: AlloRun, folder: Path) -> None:
    """Train and held-out rows."""
    train_rows, held_out = load_rows(run.data, load_tokenizer(run.model), folder, run.max_length)
    write_jsonl(folder / "train.jsonl", train_rows)
    write_jsonl(folder / "held_out.jsonl", held_out)


def fine_tune_start(run: AlloRun, folder: Path) -> None:
    """Supervised fine-tuning on the train rows' right responses."""
    rows = [
        SFTRow(r["prompt"], as_response(r["prompt"], r["target"]))
        for r in run.rows("data", "train")
    ]
    model = str(resolve_model(run.model))
    fine_tune(run, model, rows, run.sft, folder)


def fine_tune(
    run: AlloRun, model: str, rows: list[SFTRow], settings: TrainSettings, folder: Path
) -> None:
    """Supervised fine-tuning of `model`; the result goes into the stage's folder."""
    module = SupervisedFineTuning(model, **module_settings(settings, run.machine))
    data = SFTDataModule.from_rows(
        model, {"train": rows}, **data_settings(settings, run.machine, folder)
    )
    train(module, data, settings, run.machine, folder)
    _save_model(module, folder)


def _save_model(module: Any, folder: Path) -> None:
    save_language_model(module.model, module.tokenizer, folder / MODEL_FOLDER)


def draw(run: AlloRun, folder: Path) -> None:
    """Responses of the start model to the train rows."""
    model, tokenizer = run.load(run.start)
    sampled = sampling.sample(model, tokenizer, run.rows("data", "train"), run.sample)
    write_jsonl(folder / "sampled.jsonl", sampled)


def pair(run: AlloRun, folder: Path) -> None:
    """Preference pairs, and the wrong responses."""
    if run.data.kind == "preference":
        pairs, wrong = sampling.given_pairs(run.rows("data", "train"))
    else:
        pairs, wrong = sampling.make_pairs(run.rows("sample", "sampled"), run.sample)
    write_jsonl(folder / "pairs.jsonl", pairs)
    write_jsonl(folder / "wrong.jsonl", wrong)


def _pair_data(run: AlloRun, settings: Any, folder: Path) -> PreferenceDataModule:
    rows = [
        PreferenceRow(r["prompt"], r["chosen"], r["rejected"]) for r in run.rows("pairs", "pairs")
    ]
    return PreferenceDataModule.from_rows(
        str(run.start), {"train": rows}, **data_settings(settings, run.machine, folder)
    )


def warm_up(run: AlloRun, folder: Path) -> None:
    """Full-parameter DPO: shows which weights change, and is the baseline of the table."""
    module = MaskedDPO(**run.module_settings(run.warm_up), **dpo_settings(run.warm_up))
    data = _pair_data(run, run.warm_up, folder)
    train(module, data, run.warm_up, run.machine, folder)
    _save_model(module, folder)


def locate(run: AlloRun, folder: Path) -> None:
    """N1 and N2 from one score, so that the smaller lies inside the larger."""
    files = {"n1": run.locate.forget_ratio, "n2": run.locate.improve_ratio}
    if run.locate.method == "gradient":
        _locate_by_gradient(run, folder)
        return
    model: Any = load_language_model(run.start)[0]
    scores, granularity = _scores(run, model), run.locate.granularity
    for name, ratio in files.items():
        mask = select(
            scores,
            ratio,
            run.locate.scope,
            granularity=granularity,
            row_axes=conv1d_row_axes(model),
            heads=HeadLayout.from_model(model) if granularity == "head" else None,
            base_fingerprint=model.base_fingerprint,
            method=run.locate.method,
        )
        if run.locate.method == "weight_change":
            check_cut(mask, lambda: f"trained in {run.machine.precision}")
        mask.save(folder / f"{name}.safetensors")


def _scores(run: AlloRun, model: Any) -> Any:
    if run.locate.method == "weight_change":
        return weight_change_scores(run.start, run.output / "warm_up" / MODEL_FOLDER)
    if run.locate.method == "random":
        return random_scores(model, run.locate.seed)
    return magnitude_scores(model)


def _locate_by_gradient(run: AlloRun, folder: Path) -> None:
    """The gradient of the DPO loss at the start: a fit of no steps, for its first batches."""
    module = MaskedDPO(**run.module_settings(run.warm_up), **dpo_settings(run.warm_up))
    callback = KeyParameterLocalization(
        "gradient",
        run.locate.improve_ratio,
        run.locate.granularity,
        run.locate.scope,
        output=str(folder / "n2.safetensors"),
        also={str(folder / "n1.safetensors"): run.locate.forget_ratio},
        num_batches=run.locate.num_batches,
    )
    settings = dataclasses.replace(run.warm_up, max_steps=0)
    data = _pair_data(run, settings, folder)
    train(module, data, settings, run.machine, folder, [callback])


def forget(run: AlloRun, folder: Path) -> None:
    """Token-weighted NPO on wrong responses; only N1 moves."""
    rows = [
        UnlearningRow(r["prompt"], r["response"], r["token_weights"])
        for r in run.rows("token_rewards", "weighted")
    ]
    if run.forget.retain != "none":
        rows += [
            UnlearningRow(r["prompt"], r["chosen"], retain=True) for r in run.rows("pairs", "pairs")
        ]
    module = TokenWeightedNPO(
        **run.module_settings(run.forget),
        beta=run.forget.beta,
        loss_type=run.forget.loss_type,
        retain=run.forget.retain,
        retain_weight=run.forget.retain_weight,
        reference="swap" if run.forget.retain == "kl" else "cache",
    )
    data = UnlearningDataModule.from_rows(
        str(run.start), {"train": rows}, **data_settings(run.forget, run.machine, folder)
    )
    _train_masked(run, module, data, run.forget, folder, "n1")
    export_delta(module.model, folder / DELTA_FILE)


def improve(run: AlloRun, folder: Path) -> None:
    """DPO with the noisy-token filter; only N2 moves. Exports N1 ∪ N2 against the start."""
    module = MaskedDPO(
        **run.module_settings(run.improve),
        **dpo_settings(run.improve),
        delta=str(run.output / "forget" / DELTA_FILE) if run.forget.enabled else None,
        filter_side=run.improve.filter_side,
        filter_drop_fraction=run.improve.dropped,
        filter_keep_fraction=run.improve.keep_fraction,
    )
    data = _pair_data(run, run.improve, folder)
    _train_masked(run, module, data, run.improve, folder, "n2")
    moved = ParameterMask.load(run.mask("n2"))
    if run.forget.enabled:
        moved = moved | ParameterMask.load(run.mask("n1"))
    moved.save(folder / MASK_FILE)
    export_delta(module.model, folder / DELTA_FILE, moved)


def _train_masked(
    run: AlloRun, module: Any, data: Any, settings: Any, folder: Path, mask: str
) -> None:
    callback = KeyParameterLocalization(mask=str(run.mask(mask)))
    train(module, data, settings, run.machine, folder, [callback])


def export(run: AlloRun, folder: Path) -> None:
    """The mask N1 ∪ N2 and the delta against the start; the merged model where asked."""
    for name in (MASK_FILE, DELTA_FILE):
        shutil.copyfile(run.output / "improve" / name, folder / name)
    if run.merge_model:
        merge(run.start, folder / DELTA_FILE, folder / MODEL_FOLDER)


def dpo_settings(settings: DPOSettings) -> dict[str, Any]:
    """The loss's settings, as `MaskedDPO` takes them."""
    names = ("beta", "loss_type", "label_smoothing")
    return {name: getattr(settings, name) for name in names}
