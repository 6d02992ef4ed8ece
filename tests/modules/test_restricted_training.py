"""What may and may not move in a run that is restricted to a mask."""

import lightning
import pytest
import torch

from lit_align.callbacks import KeyParameterLocalization
from lit_align.compact import links
from lit_align.errors import TrainingError
from lit_align.modules import MaskedDPO, SupervisedFineTuning, TokenWeightedNPO
from tests.tiny_models import tiny_model, tiny_tokenizer
from tests.training_runs import (
    assert_close_weights,
    assert_equal_weights,
    instructions,
    preferences,
    random_mask,
    stored,
    trainer,
    unlearning,
    weights,
)

PRECISIONS = ["32-true", "bf16-true", "bf16-mixed"]
OBJECTIVES = {
    "sft": (SupervisedFineTuning, instructions),
    "dpo": (MaskedDPO, preferences),
    "npo": (TokenWeightedNPO, unlearning),
}


def fit(module, data, tmp_path, *, mask=None, callbacks=(), model=None, **settings):
    if mask is not None:
        mask.save(tmp_path / "mask")
        callbacks = [*callbacks, KeyParameterLocalization(mask=str(tmp_path / "mask"))]
    run = trainer(tmp_path, callbacks=list(callbacks), **settings)
    run.fit(module if model is None else model, data)
    return weights(module)


@pytest.mark.parametrize("granularity", ["element", "row"])
@pytest.mark.parametrize("precision", PRECISIONS)
@pytest.mark.parametrize("objective", OBJECTIVES)
def test_unselected_entries_stay_to_the_bit(
    objective, precision, granularity, tiny_llama_dir, tmp_path
):
    kind, data = OBJECTIVES[objective]
    mask = random_mask(0.1, granularity)
    module = kind(str(tiny_llama_dir), learning_rate=1e-2, weight_decay=0.5)
    after = fit(module, data(10), tmp_path, mask=mask, precision=precision, gradient_clip_val=1.0)
    dtype = torch.bfloat16 if precision == "bf16-true" else torch.float32
    moved = 0
    for name, base in stored(tiny_llama_dir).items():
        base = base.to(dtype)
        assert after[name].dtype == dtype
        unselected = ~mask.dense(name)
        assert torch.equal(after[name][unselected], base[unselected]), name
        moved += int((after[name] != base).sum())
    assert moved > 0.9 * mask.count()
    assert all(link.selected.dtype == torch.float32 for link in links(module.model))


@pytest.mark.parametrize("precision", PRECISIONS)
def test_without_a_mask_everything_trains(precision, tiny_llama_dir, tmp_path):
    module = SupervisedFineTuning(str(tiny_llama_dir), learning_rate=1e-2, weight_decay=0.1)
    after = fit(module, instructions(10), tmp_path, precision=precision)
    for name, base in stored(tiny_llama_dir).items():
        assert (after[name] != base.to(after[name].dtype)).float().mean() > 0.8, name


@pytest.mark.parametrize("reference", ["cache", "swap"])
def test_another_default_device_does_not_matter(reference, tiny_llama_dir, tmp_path, monkeypatch):
    """Lightning makes the GPU the default while the model is configured; masks come from a CPU."""
    strategy = "lightning.pytorch.strategies.SingleDeviceStrategy.tensor_init_context"
    monkeypatch.setattr(strategy, lambda self, empty_init=None: torch.device("meta"))
    for granularity in ("element", "row"):
        module = MaskedDPO(str(tiny_llama_dir), reference=reference)
        fit(module, preferences(4), tmp_path, mask=random_mask(0.1, granularity))
        assert {t.device.type for t in module.model.state_dict().values()} == {"cpu"}


def test_bf16_true_keeps_what_bf16_alone_would_lose(tiny_llama_dir, tmp_path):
    """At a low learning rate no step shows in bf16; the fp32 masters add them up."""
    module = SupervisedFineTuning(str(tiny_llama_dir), learning_rate=1e-6, warmup_ratio=0.0)
    after = fit(module, instructions(10), tmp_path, precision="bf16-true")
    base = {n: t.bfloat16() for n, t in stored(tiny_llama_dir).items()}
    total = sum(t.numel() for t in base.values())
    masters = {link.state.name: link.selected.detach() for link in links(module.model)}
    moved = sum(int((m != base[n].float().flatten()).sum()) for n, m in masters.items())
    assert moved > 0.9 * total
    assert sum(int((after[n] != t).sum()) for n, t in base.items()) < 0.1 * total


@pytest.mark.parametrize("clip", [None, 0.01])
def test_clipping_acts_on_the_selected_entries_alone(clip, tiny_llama_dir, tmp_path):
    """With a huge eps one step of Adam is the (clipped) gradient itself."""
    module = SupervisedFineTuning(
        str(tiny_llama_dir), learning_rate=1e4, eps=1e4, warmup_ratio=0.0, lr_scheduler="constant"
    )
    mask = random_mask()
    after = fit(module, instructions(4), tmp_path, mask=mask, gradient_clip_val=clip)
    base = stored(tiny_llama_dir)
    norm = torch.cat([(after[n] - t).flatten() for n, t in base.items()]).norm()
    if clip is None:
        assert norm > 0.05
    else:
        assert float(norm) == pytest.approx(clip, rel=2e-3)


class CountForwards(lightning.Callback):
    """How often the first block's MLP runs."""

    count = 0

    def on_fit_start(self, trainer, pl_module):
        def add(*_):
            self.count += 1

        pl_module.model.model.layers[0].mlp.register_forward_pre_hook(add)


@pytest.mark.parametrize("reference", ["cache", "swap"])
def test_gradient_checkpointing_gives_the_same_weights(reference, tiny_llama_dir, tmp_path):
    runs, counts = [], []
    for checkpointing in (False, True):
        module = MaskedDPO(
            str(tiny_llama_dir), learning_rate=1e-2, reference=reference,
            gradient_checkpointing=checkpointing,
        )  # fmt: skip
        counter = CountForwards()
        settings = {"mask": random_mask(), "callbacks": [counter]}
        runs.append(fit(module, preferences(8), tmp_path, **settings))
        counts.append(counter.count)
    assert_equal_weights(*runs)
    assert counts[1] == counts[0] + 2  # two steps, each with one forward more


def compiled(tiny_llama_dir, tmp_path, backend):
    runs = []
    for compile_it in (False, True):
        module = SupervisedFineTuning(str(tiny_llama_dir), learning_rate=1e-2, eps=1e-3)
        model = torch.compile(module, backend=backend) if compile_it else None
        rows = instructions(4, batch_size=4)
        runs.append(fit(module, rows, tmp_path, mask=random_mask(), model=model, max_epochs=2))
    assert_close_weights(*runs, atol=1e-5)


def test_torch_compile(tiny_llama_dir, tmp_path):
    compiled(tiny_llama_dir, tmp_path, "aot_eager")


@pytest.mark.long
def test_torch_compile_with_inductor(tiny_llama_dir, tmp_path):
    compiled(tiny_llama_dir, tmp_path, "inductor")


@pytest.mark.parametrize("kind", ["llama", "gpt2", "mixtral"])
def test_dropout_is_off(kind, tmp_path):
    """Two runs are equal, whatever the random numbers."""
    model = tiny_model(kind)
    for name in ("resid_pdrop", "embd_pdrop", "attn_pdrop", "attention_dropout"):
        if hasattr(model.config, name):
            setattr(model.config, name, 0.5)
    model.save_pretrained(tmp_path / kind)
    tiny_tokenizer().save_pretrained(tmp_path / kind)
    runs = []
    mask = random_mask(kind=kind)
    for seed in (1, 2):
        torch.manual_seed(seed)
        module = MaskedDPO(str(tmp_path / kind), learning_rate=1e-2)
        runs.append(fit(module, preferences(4), tmp_path, mask=mask))
    assert_equal_weights(*runs)


def test_clipping_by_value(tiny_llama_dir, tmp_path):
    module = SupervisedFineTuning(
        str(tiny_llama_dir), learning_rate=1e4, eps=1e4, warmup_ratio=0.0, lr_scheduler="constant"
    )
    settings = {"gradient_clip_val": 1e-3, "gradient_clip_algorithm": "value"}
    after = fit(module, instructions(4), tmp_path, mask=random_mask(), **settings)
    largest = max(float((after[n] - t).abs().max()) for n, t in stored(tiny_llama_dir).items())
    assert largest == pytest.approx(1e-3, rel=2e-3)


class WithTorchAdamW(SupervisedFineTuning):
    """Another optimiser, whose gradients are scaled and clipped in place."""

    def configure_optimizers(self):
        found = super().configure_optimizers()
        ours = found["optimizer"].param_groups[0]
        settings = {name: ours[name] for name in ("lr", "betas", "eps", "weight_decay")}
        return torch.optim.AdamW(ours["params"], **settings)


@pytest.mark.parametrize("clip", [None, 0.01])
def test_another_optimiser_sees_the_same_gradients(clip, tiny_llama_dir, tmp_path):
    settings = {"learning_rate": 1e-2, "weight_decay": 0.1, "lr_scheduler": "constant"}
    runs = []
    for kind in (SupervisedFineTuning, WithTorchAdamW):
        module = kind(str(tiny_llama_dir), warmup_ratio=0.0, **settings)
        folder = tmp_path / kind.__name__
        folder.mkdir()
        more = {"gradient_clip_val": clip, "accumulate_grad_batches": 2}
        runs.append(fit(module, instructions(8), folder, mask=random_mask(), **more))
    assert_close_weights(*runs, atol=1e-5)


@pytest.mark.parametrize("mask", [None, random_mask(0.3)], ids=["all", "30 %"])
def test_16_bit_weights_train_without_masters(mask, tiny_llama_dir, tmp_path):
    """At a learning rate below bf16's steps the mean still moves by the learning rate."""
    module = SupervisedFineTuning(
        str(tiny_llama_dir), learning_rate=1e-6, warmup_ratio=0.0, stochastic_rounding=True
    )
    after = fit(module, instructions(10), tmp_path, mask=mask, precision="bf16-true")
    trained = [p for p in module.parameters() if p.requires_grad]
    assert {p.dtype for p in trained} == {torch.bfloat16}
    base = {n: t.bfloat16() for n, t in stored(tiny_llama_dir).items()}
    moved = sum(int((after[n] != t).sum()) for n, t in base.items())
    assert 0 < moved < 0.2 * sum(t.numel() for t in base.values())


def test_stochastic_rounding_needs_16_bit_weights(tiny_llama_dir, tmp_path):
    module = SupervisedFineTuning(str(tiny_llama_dir), stochastic_rounding=True)
    with pytest.raises(TrainingError, match=r"set trainer\.precision bf16-true or 16-true"):
        fit(module, instructions(4), tmp_path)


class Sums(lightning.Callback):
    """Multiplies gradients, as the sums of very many tokens do."""

    def on_before_optimizer_step(self, trainer, pl_module, optimizer):
        for parameter in optimizer.param_groups[0]["params"]:
            grad = parameter.grad.float()
            parameter.grad.copy_(grad * (6e4 / grad.abs().max().clamp(min=1e-30)))


def test_the_norm_of_large_sums_in_fp16_does_not_overflow(tiny_llama_dir, tmp_path):
    module = SupervisedFineTuning(
        str(tiny_llama_dir), learning_rate=1e-2, warmup_ratio=0.0, stochastic_rounding=True
    )
    settings = {"precision": "16-true", "gradient_clip_val": 1.0, "callbacks": [Sums()]}
    after = fit(module, instructions(4), tmp_path, **settings)
    base = {n: t.half() for n, t in stored(tiny_llama_dir).items()}
    moved = sum(int((after[n] != t).sum()) for n, t in base.items())
    assert moved > 0.5 * sum(t.numel() for t in base.values())


def test_stochastic_rounding_needs_our_optimiser(tiny_llama_dir, tmp_path):
    module = WithTorchAdamW(str(tiny_llama_dir), stochastic_rounding=True)
    with pytest.raises(TrainingError, match="AdamW would lose most updates"):
        fit(module, instructions(4), tmp_path, precision="bf16-true")
