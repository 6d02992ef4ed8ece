"""Training adapters: as peft's own model trains, and with everything else that a run does."""

import dataclasses
import importlib.util
import json
import math

import lightning
import pytest
import torch
from lightning.pytorch.callbacks import ModelCheckpoint
from peft import AdaLoraConfig, LoraConfig, PeftModel, get_peft_model
from torch import nn
from transformers import LlamaConfig, LlamaForCausalLM

from lit_align import language_model
from lit_align.callbacks import KeyParameterLocalization
from lit_align.cli import main
from lit_align.compact import (
    AdapterSettings,
    add_adapters,
    has_adapters,
    load_adapters,
    merge_adapters,
    save_adapters,
    trainable,
)
from lit_align.compact.adapters import adapted_layers
from lit_align.compact.rank_allocation import allocation_state, layer_ranks
from lit_align.errors import LocalizationError, MaskError, ModelError, TrainingError
from lit_align.language_model import load_language_model
from lit_align.masks.linear_layers import module_names
from lit_align.modules import MaskedDPO, SupervisedFineTuning, TokenWeightedNPO
from lit_align.pipelines.commands import export
from tests.compact.test_adapters import QUERY, UP, layer_mask, randomise, token_ids
from tests.tiny_models import save_tiny_model, tiny_model, tiny_tokenizer
from tests.training_runs import (
    MemoryLogger,
    assert_equal_weights,
    instructions,
    preferences,
    random_mask,
    stored,
    trainer,
    unlearning,
    weights,
)

pytestmark = pytest.mark.filterwarnings("ignore:Model has:UserWarning", "ignore:.*deprecated")
LORA = AdapterSettings(rank=4, alpha=8, dropout=0.0)
ADALORA = AdapterSettings(
    "adalora", rank=2, initial_rank=4, alpha=8, dropout=0.0, rank_warmup=0.2, rank_final=0.3
)
LEARN = {"learning_rate": 1e-2, "warmup_ratio": 0.0, "weight_decay": 0.1}


def factors(module):
    return {n: p.detach().clone() for n, p in trainable(module.model)}


def fit(kind, folder, data, tmp_path, *, callbacks=(), ckpt_path=None, module=None, **settings):
    """A run, and its log."""
    ours = {k: settings.pop(k) for k in list(settings) if k in MODULE_SETTINGS}
    module = module or kind(str(folder), **LEARN | ours)
    log = MemoryLogger()
    run = trainer(tmp_path, logger=log, log_every_n_steps=1, callbacks=list(callbacks), **settings)
    run.fit(module, data, ckpt_path=ckpt_path)
    return module, log


MODULE_SETTINGS = ("adapter", "reference", "gradient_checkpointing", "stochastic_rounding")


class Recorded(SupervisedFineTuning):
    """Notes what it begins with, its batches, and what AdaLoRA has learnt by each step."""

    def on_train_start(self):
        self.initial, self.batches, self.scores = factors(self), [], []

    def on_train_batch_end(self, outputs, batch, batch_idx):
        super().on_train_batch_end(outputs, batch, batch_idx)
        if self.adapter.kind == "adalora":
            self.scores.append(dict(allocation_state(self.model)["exp_avg_ipt"]))

    def training_step(self, batch, batch_idx):
        self.batches.append(batch)
        return super().training_step(batch, batch_idx)


def next_token_loss(model, batch):
    """peft's and transformers' own: all logits, the mean over labels, AdaLoRA's regulariser."""
    labels = torch.full_like(batch.input_ids, -100)
    labels.view(-1)[batch.hidden_index + 1] = batch.target_ids
    return model(
        input_ids=batch.input_ids,
        attention_mask=batch.attention_mask,
        position_ids=batch.position_ids,
        labels=labels,
    ).loss


@pytest.mark.parametrize("settings", [LORA, ADALORA], ids=["lora", "adalora"])
def test_a_run_is_the_one_that_pefts_model_and_torchs_adamw_make(
    settings, tiny_llama_dir, tmp_path
):
    ours = Recorded(str(tiny_llama_dir), **LEARN, lr_scheduler="constant", adapter=settings)
    data = instructions(20, batch_size=2)
    fit(None, None, data, tmp_path, module=ours, max_epochs=1)
    base, _ = load_language_model(tiny_llama_dir)
    common = {"lora_alpha": 8, "lora_dropout": 0.0, "task_type": "CAUSAL_LM"}
    common["target_modules"] = list(module_names(base).values())
    if settings.kind == "lora":
        config = LoraConfig(r=4, **common)
    else:
        config = AdaLoraConfig(
            init_r=4, target_r=2, tinit=2, tfinal=3, deltaT=1, total_step=10, **common
        )
    theirs = get_peft_model(base, config)
    for name, parameter in trainable(theirs):
        parameter.data.copy_(ours.initial[name.removeprefix("base_model.model.")])
    optimizer = torch.optim.AdamW(
        [p for _, p in trainable(theirs)], LEARN["learning_rate"], weight_decay=0.1
    )
    for step, batch in enumerate(ours.batches, 1):
        next_token_loss(theirs, batch).backward()
        optimizer.step()
        if settings.kind == "adalora":
            theirs.base_model.update_and_allocate(step)
            scores = theirs.base_model.rankallocator.exp_avg_ipt
            assert scores.keys() == ours.scores[step - 1].keys()
            for name, score in scores.items():
                torch.testing.assert_close(ours.scores[step - 1][name], score, rtol=0.02, atol=1e-8)
        optimizer.zero_grad()
    assert len(ours.batches) == 10
    trained = factors(ours)
    for name, parameter in trainable(theirs):
        name = name.removeprefix("base_model.model.")
        if "lora_E" not in name:  # of which whole layers are 0 in the end as in the beginning
            assert not torch.equal(trained[name], ours.initial[name])
        torch.testing.assert_close(trained[name], parameter.detach(), rtol=0, atol=2e-5)
    if settings.kind == "adalora":
        ranks = layer_ranks(ours.model)
        assert sum(ranks.values()) == 2 * 15 and len(set(ranks.values())) > 1


@pytest.mark.parametrize("settings", [LORA, ADALORA], ids=["lora", "adalora"])
def test_only_adapters_train_and_decay(settings, tiny_llama_dir, tmp_path):
    module, log = fit(
        SupervisedFineTuning, tiny_llama_dir, instructions(20), tmp_path, adapter=settings
    )
    base = stored(tiny_llama_dir)
    after = {n.replace(".base_layer", ""): t for n, t in weights(module).items()}
    assert_equal_weights({n: after[n] for n in base}, base)
    per_layer = 2 if settings.kind == "lora" else 3
    assert len(factors(module)) == 15 * per_layer
    assert log.values("mask/density")[0] == pytest.approx(
        sum(t.numel() for t in factors(module).values()) / 29344, rel=0.01
    )
    # B is 0 at first: without a gradient, decay alone would leave it there.
    assert all(t.any() for n, t in factors(module).items() if "lora_B" in n)


def test_a_data_set_smaller_than_a_batch(tiny_llama_dir, tmp_path):
    module, log = fit(
        SupervisedFineTuning, tiny_llama_dir, instructions(3, batch_size=8), tmp_path, adapter=LORA
    )
    assert module.global_step == 1 and len(log.values("loss")) == 1


def test_adalora_says_how_many_steps_it_needs(tiny_llama_dir, tmp_path):
    with pytest.raises(TrainingError, match="between steps 0 and 1, of 1 in all: too few"):
        fit(SupervisedFineTuning, tiny_llama_dir, instructions(3), tmp_path, adapter=ADALORA)


# ---- dropout and gradient checkpointing


def test_dropout_is_the_adapters_alone_and_off_in_evaluation(tmp_path):
    folder = tmp_path / "gpt2"
    save_tiny_model(folder, "gpt2")  # a base with dropout of its own
    settings = dataclasses.replace(LORA, dropout=0.5)
    module, _ = fit(
        SupervisedFineTuning, folder, instructions(4), tmp_path, adapter=settings, max_steps=1
    )
    randomise(module.model)
    rates = {m.p for n, m in module.model.named_modules() if isinstance(m, nn.Dropout)}
    kept = {m.p for n, m in module.model.named_modules() if "lora_dropout" in n and hasattr(m, "p")}
    assert kept == {0.5} and rates == {0.0, 0.5}
    batch = next(iter(instructions_of(module)))
    losses = {}
    for mode in (True, False):
        module.model.train(mode)
        losses[mode] = {float(module._objective(batch, None).loss_sum) for _ in range(3)}
    assert len(losses[True]) == 3 and len(losses[False]) == 1


class SameStart(lightning.Callback):
    """A drawn anew; how many numbers were drawn before the run's own does not count."""

    def on_train_start(self, trainer, pl_module):
        g = torch.Generator().manual_seed(2)
        for name, parameter in trainable(pl_module.model):
            if "lora_A" in name:
                parameter.data.copy_(torch.randn(parameter.shape, generator=g) / 6)


def instructions_of(module):
    return module.trainer.datamodule.train_dataloader()


@pytest.mark.parametrize("dropout", [0.0, 0.5])
def test_gradient_checkpointing_gives_the_same_gradients(dropout, tiny_llama_dir, tmp_path):
    settings = dataclasses.replace(LORA, dropout=dropout)
    trained = []
    for checkpointing in (False, True):
        torch.manual_seed(0)
        module, _ = fit(
            SupervisedFineTuning, tiny_llama_dir, instructions(), tmp_path, adapter=settings,
            gradient_checkpointing=checkpointing, callbacks=[SameStart()],
        )  # fmt: skip
        trained.append(factors(module))
    assert module.model.is_gradient_checkpointing
    for name in trained[0]:
        torch.testing.assert_close(trained[0][name], trained[1][name], rtol=0, atol=1e-6)


@pytest.mark.long
def test_torch_compile(tiny_llama_dir, tmp_path):
    trained = []
    for compile_it in (False, True):
        module = SupervisedFineTuning(str(tiny_llama_dir), **LEARN, adapter=LORA)
        run = trainer(tmp_path, callbacks=[SameStart()], max_epochs=2)
        model = torch.compile(module, backend="aot_eager") if compile_it else module
        run.fit(model, instructions(4, batch_size=4))
        trained.append(factors(module))
    for name in trained[0]:
        torch.testing.assert_close(trained[0][name], trained[1][name], rtol=0, atol=1e-5)


# ---- preference losses and their reference


@pytest.mark.parametrize("precision", ["32-true", "bf16-true", "bf16-mixed"])
def test_cached_and_swapped_references_are_equal(precision, tiny_llama_dir, tmp_path):
    found = []
    for reference in ("cache", "swap"):
        # One row a batch: in bf16 log-probs depend on what else is in a batch.
        module, log = fit(
            MaskedDPO, tiny_llama_dir, preferences(8, batch_size=1), tmp_path, adapter=LORA,
            reference=reference, precision=precision, callbacks=[SameStart()],
        )  # fmt: skip
        assert all(p.dtype == torch.float32 for p in factors(module).values())
        found.append(log)
    losses, margins = ([log.values(n) for log in found] for n in ("loss", "rewards/margins"))
    exact = precision == "32-true"
    assert losses[0] == pytest.approx(losses[1], rel=1e-5 if exact else 5e-3)
    assert losses[0][0] == pytest.approx(math.log(2), abs=1e-6 if exact else 1e-3)
    assert abs(margins[0][-1]) > 1e-3  # the policy has moved away from its reference


def test_a_distribution_is_compared_with_the_base(tiny_llama_dir, tmp_path):
    """`retain: kl` forms whole logits by the head itself; at first they are the reference's."""
    module = TokenWeightedNPO(
        str(tiny_llama_dir), retain="kl", reference="swap", adapter=LORA, **LEARN
    )
    _, log = fit(None, None, unlearning(12), tmp_path, module=module)
    assert log.values("retain_loss")[0] == pytest.approx(0, abs=1e-6)
    assert log.values("retain_loss")[-1] > 1e-5


# ---- masks


def with_mask(mask, path):
    mask.save(path)
    return KeyParameterLocalization(mask=str(path))


def test_a_mask_of_layers_says_where_adapters_go(tiny_llama_dir, tmp_path):
    given = with_mask(layer_mask(QUERY, UP), tmp_path / "mask")
    module, _ = fit(
        SupervisedFineTuning, tiny_llama_dir, instructions(), tmp_path, callbacks=[given],
        adapter=LORA,
    )  # fmt: skip
    assert adapted_layers(module.model) == [QUERY, UP]
    assert len(factors(module)) == 4 and module.mask is None


def test_what_does_not_go_with_adapters(tiny_llama_dir, tmp_path):
    def run(error, message, *callbacks, **settings):
        with pytest.raises(error, match=message):
            fit(
                SupervisedFineTuning, tiny_llama_dir, instructions(4), tmp_path,
                callbacks=callbacks, **{"adapter": LORA} | settings,
            )  # fmt: skip

    elements = with_mask(random_mask(), tmp_path / "mask")
    run(MaskError, "element.*selects a part", elements)
    run(LocalizationError, "trains adapters", KeyParameterLocalization("weight_change"))
    run(TrainingError, "fp32 adapters", stochastic_rounding=True, precision="bf16-true")
    run(ModelError, "no linear layer is 'w_q'", adapter=AdapterSettings(layers=["w_q"]))


def test_a_module_that_takes_no_adapter_says_so(tiny_llama_dir, tmp_path):
    class Other(SupervisedFineTuning):
        def _restrict(self, dtype):
            pass

    module = Other(str(tiny_llama_dir), adapter=LORA)
    with pytest.raises(TrainingError, match="Other takes no adapter"):
        fit(None, None, instructions(4), tmp_path, module=module)


# ---- checkpoints


def checkpointed(tmp_path):
    return ModelCheckpoint(tmp_path / "checkpoints", "{step}", every_n_train_steps=1, save_top_k=-1)


@pytest.fixture(params=[LORA, ADALORA], ids=["lora", "adalora"])
def whole_run(request, tiny_llama_dir, tmp_path):
    """Ten steps in two epochs, with a checkpoint of each."""
    module, log = fit(
        SupervisedFineTuning, tiny_llama_dir, instructions(batch_size=2), tmp_path, max_epochs=2,
        callbacks=[checkpointed(tmp_path)], enable_checkpointing=True, adapter=request.param,
    )  # fmt: skip
    return request.param, module, log


@pytest.mark.parametrize("step", [2, 5, 8])
def test_a_resumed_run_ends_like_an_uninterrupted_one(step, whole_run, tiny_llama_dir, tmp_path):
    """AdaLoRA's schedule is in its warm-up, in its midst and at its end then."""
    settings, whole, log = whole_run
    torch.manual_seed(1)  # other initial values: all that counts is in the checkpoint
    resumed, again = fit(
        SupervisedFineTuning, tiny_llama_dir, instructions(batch_size=2), tmp_path, max_epochs=2,
        ckpt_path=tmp_path / "checkpoints" / f"step={step}.ckpt", adapter=settings,
    )  # fmt: skip
    assert_equal_weights(factors(whole), factors(resumed))
    assert again.values("loss") == log.values("loss")[step:]
    if settings.kind == "adalora":
        assert layer_ranks(resumed.model) == layer_ranks(whole.model)


def test_a_checkpoint_holds_adapters_alone_and_opens_without_our_classes(whole_run, tmp_path):
    settings, module, _ = whole_run
    path = tmp_path / "checkpoints" / "step=10.ckpt"
    checkpoint = torch.load(path, weights_only=True)
    assert set(checkpoint["state_dict"]) == {f"language_model.{n}" for n in factors(module)}
    assert AdapterSettings(**checkpoint["hyper_parameters"]["adapter"]) == settings
    again = SupervisedFineTuning(**checkpoint["hyper_parameters"])  # load_from_checkpoint does so
    assert again.adapter == settings


@pytest.mark.parametrize(
    "other",
    [None, dataclasses.replace(LORA, rank=3), dataclasses.replace(LORA, layers=["q_proj"])],
)
def test_a_checkpoint_of_other_adapters_is_refused(other, tiny_llama_dir, tmp_path):
    fit(
        SupervisedFineTuning, tiny_llama_dir, instructions(2, batch_size=2), tmp_path,
        callbacks=[checkpointed(tmp_path)], enable_checkpointing=True, adapter=LORA,
    )  # fmt: skip
    with pytest.raises(TrainingError, match=r"the checkpoint has adapter \{'kind': 'lora'"):
        fit(
            SupervisedFineTuning, tiny_llama_dir, instructions(2, batch_size=2), tmp_path,
            ckpt_path=tmp_path / "checkpoints" / "step=1.ckpt", adapter=other,
        )  # fmt: skip


@torch.no_grad()
def test_a_checkpoint_is_exported_as_pefts_folder_and_that_as_a_model(
    whole_run, tiny_llama_dir, tmp_path, capsys
):
    _, module, _ = whole_run
    ids, model = token_ids(), module.model.eval()
    checkpoint = str(tmp_path / "checkpoints" / "step=10.ckpt")
    export(str(tmp_path / "adapters"), checkpoint=checkpoint)
    base, _ = load_language_model(tiny_llama_dir)
    theirs = PeftModel.from_pretrained(base, str(tmp_path / "adapters"))
    assert torch.equal(theirs(input_ids=ids).logits, model(input_ids=ids).logits)
    export(str(tmp_path / "merged"), str(tiny_llama_dir), adapter=str(tmp_path / "adapters"))
    merged, _ = load_language_model(tmp_path / "merged")
    torch.testing.assert_close(
        merged(input_ids=ids).logits, model(input_ids=ids).logits, rtol=1e-4, atol=1e-4
    )
    assert capsys.readouterr().out.split() == [str(tmp_path / n) for n in ("adapters", "merged")]


def test_exports_that_cannot_be(whole_run, tiny_llama_dir, tmp_path):
    checkpoint = str(tmp_path / "checkpoints" / "step=10.ckpt")
    with pytest.raises(TrainingError, match="adapters are a folder"):
        export(str(tmp_path / "a.safetensors"), checkpoint=checkpoint)
    with pytest.raises(TrainingError, match="need --model"):
        export(str(tmp_path / "a"), adapter=str(tmp_path))
    with pytest.raises(TrainingError, match="takes --checkpoint, or"):
        export(str(tmp_path / "a"), "m", adapter="a", delta="d")


# ---- 4-bit weights


NF4 = dataclasses.replace(LORA, quantization="nf4")


def test_nf4_without_bitsandbytes_says_what_to_install(monkeypatch, tiny_llama_dir, tmp_path):
    find = importlib.util.find_spec
    monkeypatch.setattr(
        importlib.util, "find_spec", lambda n, *a: None if n == "bitsandbytes" else find(n, *a)
    )
    with pytest.raises(ModelError, match=r"bitsandbytes.*pip install 'lit-align\[qlora\]'"):
        fit(SupervisedFineTuning, tiny_llama_dir, instructions(4), tmp_path, adapter=NF4)


@pytest.mark.parametrize("kind", [ImportError, RuntimeError])
def test_nf4_where_bitsandbytes_cannot_run_says_why(kind, monkeypatch, tiny_llama_dir, tmp_path):
    def fail(*args, **kwargs):
        raise kind("none of the devices is supported")

    monkeypatch.setattr(language_model, "_nf4_settings", lambda device, dtype: {})
    monkeypatch.setattr(language_model.AutoModelForCausalLM, "from_pretrained", fail)
    message = r"on cpu: none of the devices is supported; pip install 'lit-align\[qlora\]'"
    with pytest.raises(ModelError, match=message):
        fit(SupervisedFineTuning, tiny_llama_dir, instructions(4), tmp_path, adapter=NF4)


@pytest.fixture
def wide_dir(tmp_path):
    """bitsandbytes quantises in blocks of 64."""
    pytest.importorskip("bitsandbytes", reason="the extra qlora is not installed")
    config = LlamaConfig(
        vocab_size=384, hidden_size=64, intermediate_size=128, num_hidden_layers=2,
        num_attention_heads=4, tie_word_embeddings=True, pad_token_id=0,
    )  # fmt: skip
    LlamaForCausalLM(config).save_pretrained(tmp_path / "wide")
    tiny_tokenizer().save_pretrained(tmp_path / "wide")
    return tmp_path / "wide"


@pytest.mark.filterwarnings("ignore::UserWarning")
@pytest.mark.parametrize("kind", ["lora", "adalora"])
def test_qlora(kind, wide_dir, tmp_path):
    settings = dataclasses.replace(NF4, kind=kind)
    mask = with_mask(layer_mask(UP, QUERY, like=wide_dir), tmp_path / "mask")
    module, log = fit(
        MaskedDPO, wide_dir, preferences(8), tmp_path, adapter=settings, reference="swap",
        max_epochs=4, callbacks=[mask],
    )  # fmt: skip
    packed = module.model.model.layers[0].self_attn.q_proj.get_base_layer().weight
    assert packed.dtype == torch.uint8
    assert log.values("rewards/margins")[0] == 0
    assert adapted_layers(module.model) == [QUERY, UP]
    with pytest.raises(ModelError, match="quantised weights"):
        merge_adapters(module.model)
    assert has_adapters(module.model)
    save_adapters(module.model, tmp_path / "adapters")
    base, _ = load_language_model(wide_dir)
    assert list(load_adapters(tmp_path / "adapters", base)) == [QUERY, UP]
    for method in ("gradient", "random"):
        with pytest.raises(LocalizationError, match="quantised"):
            fit(
                SupervisedFineTuning, wide_dir, instructions(4), tmp_path, adapter=settings,
                callbacks=[KeyParameterLocalization(method)],
            )  # fmt: skip


@pytest.mark.filterwarnings("ignore::UserWarning")
def test_gradients_through_nf4_do_not_change_by_an_evaluation(wide_dir):
    """On some CPUs bitsandbytes re-packs weights there, into what has no backward."""
    found = []
    for evaluates in (False, True):
        torch.manual_seed(0)
        model, _ = load_language_model(wide_dir, nf4_on=torch.device("cpu"))
        if evaluates:
            with torch.no_grad():
                model(input_ids=token_ids())
        add_adapters(model, LORA)
        randomise(model)
        model.train()
        model(input_ids=token_ids()).logits.square().sum().backward()
        found.append({n: p.grad for n, p in trainable(model)})
    assert_equal_weights(*found)


# ---- the command line


def test_the_command_line_trains_adapters(tiny_llama_dir, tmp_path):
    rows = [{"prompt": f"What is {i} + 1?", "response": f"It is {i + 1}."} for i in range(4)]
    file = tmp_path / "rows.jsonl"
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    main(
        [
            "fit", "--model=SupervisedFineTuning", f"--model.model={tiny_llama_dir}",
            "--model.adapter.kind=lora", "--model.adapter.rank=8", "--data=SFTDataModule",
            f"--data.train_file={file}", "--trainer.accelerator=cpu", "--trainer.max_steps=1",
            "--trainer.enable_progress_bar=false", "--trainer.enable_model_summary=false",
            f"--trainer.default_root_dir={tmp_path / 'run'}",
        ]
    )  # fmt: skip
    (path,) = (tmp_path / "run").rglob("*.ckpt")
    export(str(tmp_path / "adapters"), checkpoint=str(path))
    base = tiny_model()
    base.base_fingerprint = None
    changes = load_adapters(tmp_path / "adapters", base)
    assert len(changes) == 15 and changes[QUERY].a.shape == (8, 32)
