"""Lightning's checkpoints hold the trainable entries alone, and a run resumes from any of them."""

import pytest
import torch
from lightning.pytorch.callbacks import ModelCheckpoint
from transformers import LlamaConfig, LlamaForCausalLM

from lit_align.callbacks import KeyParameterLocalization
from lit_align.compact import export_delta, merge
from lit_align.errors import TrainingError
from lit_align.language_model import load_language_model
from lit_align.masks import ParameterMask, named_shapes
from lit_align.masks.granularity import Selection
from lit_align.modules import MaskedDPO, SupervisedFineTuning
from lit_align.pipelines.commands import export
from tests.tiny_models import save_tiny_model, tiny_tokenizer
from tests.training_runs import (
    MemoryLogger,
    assert_equal_weights,
    instructions,
    preferences,
    random_mask,
    trainer,
    weights,
)

LEARN = {"learning_rate": 1e-2, "weight_decay": 0.1}


def fit(
    folder, tmp_path, *, ckpt_path=None, mask=None, epochs=2, every=1, rows=10, log_every=1,
    **settings,
):  # fmt: skip
    """A DPO run that keeps a checkpoint of every `every` steps."""
    module = MaskedDPO(str(folder), **LEARN, **settings)
    log = MemoryLogger()
    saving = ModelCheckpoint(
        tmp_path / "checkpoints", "{step}", every_n_train_steps=every, save_top_k=-1
    )
    localization = (
        KeyParameterLocalization(mask=str(mask)) if mask else KeyParameterLocalization("random")
    )
    run = trainer(
        tmp_path, callbacks=[saving, localization], enable_checkpointing=True, max_epochs=epochs,
        logger=log, log_every_n_steps=log_every,
    )  # fmt: skip
    run.fit(module, preferences(rows, batch_size=2), ckpt_path=ckpt_path)
    return module, log


@pytest.fixture(scope="module")
def larger_dir(tmp_path_factory):
    """Large enough that what a checkpoint holds besides tensors does not count."""
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=4000, hidden_size=128, intermediate_size=256, num_hidden_layers=2,
        num_attention_heads=4, num_key_value_heads=2, tie_word_embeddings=True, pad_token_id=0,
    )  # fmt: skip
    folder = tmp_path_factory.mktemp("larger")
    LlamaForCausalLM(config).save_pretrained(folder)
    tiny_tokenizer().save_pretrained(folder)
    return folder


@pytest.mark.parametrize("ratio", [0.1, 0.3])
def test_the_checkpoint_has_the_masks_size(ratio, larger_dir, tmp_path):
    module = MaskedDPO(str(larger_dir), **LEARN)
    run = trainer(
        tmp_path,
        callbacks=[KeyParameterLocalization("random", ratio)],
        max_steps=2,
        max_epochs=None,
    )
    run.fit(module, preferences(4, batch_size=2))
    run.save_checkpoint(tmp_path / "ckpt")
    assert module.mask is not None
    dense = module.mask.total() * 12  # fp32 weights and two moments
    size = (tmp_path / "ckpt").stat().st_size
    assert ratio * dense < size < 1.05 * ratio * dense
    state = torch.load(tmp_path / "ckpt", weights_only=True)["state_dict"]
    assert sum(t.numel() for t in state.values()) == module.mask.count()


@pytest.mark.parametrize("step", [2, 5, 7, 10])
def test_a_resumed_run_ends_like_an_uninterrupted_one(step, tiny_llama_dir, tmp_path):
    """Five steps an epoch: from the middle and from the end of both epochs."""
    whole, log = fit(tiny_llama_dir, tmp_path)
    resumed, log_again = fit(
        tiny_llama_dir, tmp_path, ckpt_path=tmp_path / "checkpoints" / f"step={step}.ckpt"
    )
    assert_equal_weights(weights(whole), weights(resumed))
    assert log_again.values("loss") == log.values("loss")[step:]
    assert log_again.values("num_tokens") == log.values("num_tokens")[step:]
    assert log_again.values("learning_rate") == log.values("learning_rate")[step:]


def test_a_resumed_run_of_steps_in_one_pass_ends_like_an_uninterrupted_one(
    tiny_llama_dir, tmp_path
):
    """Steps that are logged take two passes over the head: here hardly any is."""
    whole, _ = fit(tiny_llama_dir, tmp_path, log_every=1000)
    checkpoint = tmp_path / "checkpoints" / "step=5.ckpt"
    resumed, _ = fit(tiny_llama_dir, tmp_path, ckpt_path=checkpoint, log_every=1000)
    assert_equal_weights(weights(whole), weights(resumed))


def test_resuming_between_accumulation_windows(tiny_llama_dir, tmp_path):
    def run(ckpt_path=None):
        module = SupervisedFineTuning(str(tiny_llama_dir), **LEARN)
        saving = ModelCheckpoint(tmp_path, "{step}", every_n_train_steps=1, save_top_k=-1)
        settings = {"accumulate_grad_batches": 2, "enable_checkpointing": True}
        mine = trainer(tmp_path, callbacks=[saving], **settings)
        mine.fit(module, instructions(10, batch_size=2), ckpt_path=ckpt_path)
        assert mine.global_step == 3
        return weights(module)

    whole = run()
    assert_equal_weights(whole, run(tmp_path / "step=1.ckpt"))
    assert_equal_weights(whole, run(tmp_path / "step=2.ckpt"))


def test_bf16_resumes_from_fp32_masters(tiny_llama_dir, tmp_path):
    def run(ckpt_path=None):
        module = MaskedDPO(str(tiny_llama_dir), learning_rate=1e-4)
        saving = ModelCheckpoint(tmp_path, "{step}", every_n_train_steps=1, save_top_k=-1)
        mine = trainer(
            tmp_path, callbacks=[saving], enable_checkpointing=True, precision="bf16-true"
        )
        mine.fit(module, preferences(6, batch_size=2), ckpt_path=ckpt_path)
        return module

    whole, again = run(), run(tmp_path / "step=1.ckpt")
    assert_equal_weights(whole.state_dict(), again.state_dict())
    assert_equal_weights(weights(whole), weights(again))
    assert all(t.dtype == torch.float32 for t in whole.state_dict().values())


@pytest.mark.parametrize("mask", [None, "mask"])
def test_a_run_in_bf16_is_exported(mask, tiny_llama_dir, tmp_path):
    """Where whole parameters have masters; without a mask all do."""
    if mask is not None:
        mask = str(tmp_path / mask)
        selections = dict(random_mask().selections)
        selections["model.norm.weight"] = Selection.all((32,))
        ParameterMask(selections).save(mask)
    module = MaskedDPO(str(tiny_llama_dir), learning_rate=1e-3)
    callbacks = [ModelCheckpoint(tmp_path, "{step}", every_n_train_steps=1, save_top_k=-1)]
    if mask is not None:
        callbacks.append(KeyParameterLocalization(mask=mask))
    mine = trainer(tmp_path, callbacks=callbacks, enable_checkpointing=True, precision="bf16-true")
    mine.fit(module, preferences(2, batch_size=2))
    export(str(tmp_path / "out"), checkpoint=str(tmp_path / "step=1.ckpt"), mask=mask)
    exported, _ = load_language_model(tmp_path / "out", dtype="bfloat16")
    trained = weights(module)
    assert_equal_weights({n: exported.state_dict()[n] for n in trained}, trained)


def test_another_masks_checkpoint_is_refused(tiny_llama_dir, tmp_path):
    fit(tiny_llama_dir, tmp_path, epochs=1)
    random_mask(0.2).save(tmp_path / "other")
    with pytest.raises(TrainingError, match="mask_digest"):
        fit(
            tiny_llama_dir,
            tmp_path,
            mask=tmp_path / "other",
            ckpt_path=tmp_path / "checkpoints" / "step=1.ckpt",
        )


def test_another_bases_checkpoint_is_refused(tiny_llama_dir, tmp_path):
    random_mask().save(tmp_path / "mask")
    fit(tiny_llama_dir, tmp_path, mask=tmp_path / "mask", epochs=1)
    other = save_tiny_model(tmp_path / "other", seed=4)
    with pytest.raises(TrainingError, match="base_fingerprint"):
        fit(
            other,
            tmp_path,
            mask=tmp_path / "mask",
            ckpt_path=tmp_path / "checkpoints" / "step=1.ckpt",
        )


def test_another_deltas_checkpoint_is_refused(tiny_llama_dir, tmp_path):
    model, _ = load_language_model(tiny_llama_dir)
    export_delta(model, tmp_path / "delta", random_mask(0.05))
    random_mask().save(tmp_path / "mask")
    delta = str(tmp_path / "delta")
    fit(tiny_llama_dir, tmp_path, mask=tmp_path / "mask", epochs=1, rows=2, delta=delta)
    path = tmp_path / "checkpoints" / "step=1.ckpt"
    with pytest.raises(TrainingError, match="delta_checksum"):
        fit(tiny_llama_dir, tmp_path, mask=tmp_path / "mask", ckpt_path=path)


def test_export_of_a_deltad_run_gives_the_trained_model(tiny_llama_dir, tmp_path):
    start, _ = load_language_model(tiny_llama_dir)
    with torch.no_grad():
        start.model.norm.weight.add_(0.5)
    selections = {n: Selection.none(s) for n, s in named_shapes(start).items()}
    selections["model.norm.weight"] = Selection.all((32,))
    delta, mask = str(tmp_path / "delta"), str(tmp_path / "mask")
    export_delta(start, delta, ParameterMask(selections))
    random_mask().save(mask)
    module, _ = fit(tiny_llama_dir, tmp_path, mask=mask, epochs=1, rows=2, delta=delta)
    path = str(tmp_path / "checkpoints" / "step=1.ckpt")
    export(str(tmp_path / "x.safetensors"), checkpoint=path, mask=mask)
    merge(tiny_llama_dir, tmp_path / "x.safetensors", tmp_path / "merged")
    merged, _ = load_language_model(tmp_path / "merged")
    assert_equal_weights(merged.state_dict(), weights(module))


def test_a_checkpoint_of_something_else_is_refused(tiny_llama_dir, tmp_path):
    module, _ = fit(tiny_llama_dir, tmp_path, epochs=1)
    state = module.state_dict()
    name = next(iter(state))
    with pytest.raises(TrainingError, match="another mask"):
        module.load_state_dict({n: t for n, t in state.items() if n != name})
    with pytest.raises(TrainingError, match=name.removeprefix("language_model.")):
        module.load_state_dict(state | {name: torch.zeros(1)})


def test_evaluation_from_a_checkpoint_is_of_the_trained_weights(tiny_llama_dir, tmp_path):
    data = preferences(10, batch_size=2)
    data._typed_rows["test"] = data._typed_rows["train"]
    trained, _ = fit(tiny_llama_dir, tmp_path)
    path = str(tmp_path / "mask.safetensors")
    fresh = MaskedDPO(str(tiny_llama_dir), **LEARN)
    run = trainer(tmp_path, callbacks=[KeyParameterLocalization(mask=path)])
    (there,) = run.test(fresh, data, ckpt_path=tmp_path / "checkpoints" / "step=10.ckpt")
    (here,) = trainer(tmp_path).test(trained, data)
    assert_equal_weights(weights(trained), weights(fresh))
    assert there == here
