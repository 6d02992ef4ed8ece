"""The shared_prefix layout computes what the padded one does, or is refused."""

import pytest
import torch
from lightning.pytorch.callbacks import ModelCheckpoint
from transformers import AutoConfig, AutoModelForCausalLM

from lit_align.callbacks import KeyParameterLocalization
from lit_align.compact import restrict
from lit_align.compact.adapters import AdapterSettings
from lit_align.data.packing import collate
from lit_align.data.shared_prefix import pack
from lit_align.errors import ModelError
from lit_align.masks import select
from lit_align.modules import MaskedDPO, SupervisedFineTuning, TokenWeightedNPO
from lit_align.modules.document_attention import (
    DocumentLayout,
    _compiled,
    by_document,
    by_flex_attention,
)
from lit_align.modules.forward import per_token_logps
from lit_align.modules.shared_prefix import enable_shared_prefix, is_enabled
from tests.attention_models import COMMON
from tests.tiny_models import tiny_model
from tests.training_runs import (
    MemoryLogger,
    assert_close_weights,
    assert_equal_weights,
    instructions,
    preference_rows,
    preferences,
    trainer,
    unlearning,
    weights,
)

GQA = {"num_key_value_heads": 2}
MIXED = {"layer_types": ["sliding_attention", "full_attention"], "sliding_window": 4}
# Windows are shorter than the sequences, which have up to 15 tokens.
MODELS = {
    "llama": ("llama", GQA),
    "qwen2": ("qwen2", GQA),
    "qwen2 with a window": ("qwen2", GQA | MIXED | {"use_sliding_window": True}),
    "mistral": ("mistral", GQA | {"sliding_window": 4}),
    "gemma3": ("gemma3_text", GQA | MIXED | {"head_dim": 8, "query_pre_attn_scalar": 8}),
    "gpt2": ("gpt2", {"n_embd": 32, "n_head": 4, "n_layer": 2, "n_positions": 64}),
    "mixtral": ("mixtral", GQA | {"num_local_experts": 4, "sliding_window": 4}),
}
REFUSED = {
    "a window that attention is not told": ("llama", GQA | {"sliding_window": 4}, "window of 4"),
    "recurrence": ("llama", GQA | {"layer_types": ["linear_attention"] * 2}, "linear_attention"),
    "chunks": ("llama", GQA | {"attention_chunk_size": 8}, "chunks"),
    "alibi": ("falcon", {"alibi": True, "ffn_hidden_size": 40}, "AttentionInterface"),
    "convolutions": ("lfm2", GQA | {"layer_types": ["conv", "full_attention"]}, "type conv"),
}


def build(model_type, differing, implementation="sdpa"):
    """A random model whose attention matters."""
    torch.manual_seed(0)
    common = {"vocab_size": 384} if model_type == "gpt2" else COMMON
    config = AutoConfig.for_model(model_type, **common | differing)
    model = AutoModelForCausalLM.from_config(config, attn_implementation=implementation)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter), alpha=0.2)
    return model.eval()


@pytest.fixture(scope="module")
def batches():
    """The same pairs in both layouts."""
    data = preferences(6)
    data.setup("fit")
    packed = pack(data.train_rows)
    assert {1, 3} <= {len(document) for document in packed.documents}
    return collate(data.train_rows, pad_id=0), packed


def logps_and_gradients(model, batch):
    """Weighted unevenly, so that no target can stand for another."""
    logps = per_token_logps(model, batch)
    weighted = logps * torch.linspace(-1, 1, len(logps))
    parameters = {n: p for n, p in model.named_parameters() if p.requires_grad}
    grads = torch.autograd.grad(weighted.sum(), list(parameters.values()))
    return logps.detach(), dict(zip(parameters, grads, strict=True))


def assert_equal_in_both_layouts(model, batches):
    padded, packed = (logps_and_gradients(model, batch) for batch in batches)
    assert is_enabled(model)
    torch.testing.assert_close(packed[0], padded[0], rtol=1e-5, atol=1e-5)
    for name, grad in padded[1].items():
        torch.testing.assert_close(packed[1][name], grad, rtol=1e-4, atol=1e-4, msg=name)


@pytest.mark.parametrize("name", MODELS)
def test_log_probs_and_gradients_equal_the_padded_layouts(name, batches):
    assert_equal_in_both_layouts(build(*MODELS[name]), batches)


@pytest.mark.parametrize("granularity", ["element", "row"])
def test_restricted_and_checkpointed_too(granularity, batches):
    model = build(*MODELS["mistral"])
    scores = {n: torch.rand(p.shape) for n, p in model.named_parameters()}
    restrict(model, select(scores, 0.3, granularity=granularity))
    model.gradient_checkpointing_enable({"use_reentrant": False})
    assert_equal_in_both_layouts(model.train(), batches)


def test_a_window_counts_positions_and_not_places_in_the_row():
    # The prefix 0 1 2 3, then branches of 2: with a window of 3 position 4 sees 2, 3 and itself.
    layout = DocumentLayout(((4, 2, 2),), torch.device("cpu"))
    (mask,) = layout.masks(3, torch.float32)
    seen = [(row == 0).nonzero().flatten().tolist() for row in mask]
    assert seen == [[0], [0, 1], [0, 1, 2], [1, 2, 3], [2, 3, 4], [3, 4, 5], [2, 3, 6], [3, 6, 7]]
    assert layout.masks(3, torch.float32)[0] is mask  # made once for all layers


@pytest.mark.parametrize(("window", "heads"), [(None, (4, 2)), (3, (3, 1))])
def test_flex_attention_is_the_same_forward(window, heads):
    layout = DocumentLayout(((7, 5, 3), (4,), (6, 2, 2, 1)), torch.device("cpu"))
    g = torch.Generator().manual_seed(0)
    sizes = [(1, h, sum(layout.lengths), 16) for h in (heads[0], heads[1], heads[1])]
    q, k, v = (torch.randn(size, generator=g) for size in sizes)
    by_sdpa = by_document(q, k, v, layout, window, scaling=0.3)
    torch.testing.assert_close(by_flex_attention(q, k, v, layout, window, scaling=0.3), by_sdpa)
    capped = by_flex_attention(q, k, v, layout, window, scaling=0.3, softcap=1.5)
    assert not torch.allclose(capped, by_sdpa, atol=0.01)
    # Of one head's first branch by hand: token 9 is the third of the branch, at position 9.
    keys = [p for p in range(10) if window is None or 9 - p < window]
    scores = 1.5 * torch.tanh(q[0, 0, 9] @ k[0, 0, keys].T * 0.3 / 1.5)
    torch.testing.assert_close(capped[0, 9, 0], scores.softmax(0) @ v[0, 0, keys])


def test_flex_attention_takes_the_dtype_of_autocast():
    layout = DocumentLayout(((3, 2, 2),), torch.device("cpu"))
    q, k = torch.randn(1, 4, 7, 8), torch.randn(1, 2, 7, 8)
    given = []

    def attend(*tensors, **_):
        given.extend(tensor.dtype for tensor in tensors)
        return tensors[0]

    with torch.autocast("cpu", torch.bfloat16):
        by_flex_attention(q, k, k.bfloat16(), layout, attend=attend)
    assert given == [torch.bfloat16] * 3


def test_more_graphs_are_compiled_than_by_default(monkeypatch):
    monkeypatch.setattr(torch, "compile", lambda function: function)
    before = torch._dynamo.config.recompile_limit
    assert _compiled.__wrapped__(lambda: torch._dynamo.config.recompile_limit)() > 4 * before
    assert torch._dynamo.config.recompile_limit == before


@pytest.mark.parametrize("name", ["llama", "gpt2"])
def test_other_calls_of_the_model_stay_as_they_were(name, batches):
    model, enabled = build(*MODELS[name]), build(*MODELS[name])
    enable_shared_prefix(enabled)
    ids, mask = batches[0].input_ids, batches[0].attention_mask
    theirs = [m(input_ids=ids, attention_mask=mask).logits for m in (model, enabled)]
    assert torch.equal(*theirs)
    settings = {"max_new_tokens": 6, "do_sample": False, "pad_token_id": 0}
    left = {"input_ids": ids.flip(1), "attention_mask": mask.flip(1)}  # padded on the left
    assert torch.equal(*(m.generate(**left, **settings) for m in (model, enabled)))


def test_it_is_no_part_of_a_saved_model(tmp_path):
    model = tiny_model()
    enable_shared_prefix(model)
    model.save_pretrained(tmp_path)
    assert "shared_prefix" not in (tmp_path / "config.json").read_text()


@pytest.mark.parametrize("reason", REFUSED)
def test_models_that_cannot_take_it_are_refused_and_left_alone(reason):
    model_type, differing, message = REFUSED[reason]
    model = build(model_type, differing)
    with pytest.raises(ModelError, match=rf"{type(model).__name__}.*{message}.*layout: padded"):
        enable_shared_prefix(model)
    assert model.config._attn_implementation == "sdpa"


def test_attention_that_sees_more_than_its_document_is_refused(monkeypatch):
    monkeypatch.setattr(
        "lit_align.modules.document_attention.DocumentLayout._mask", lambda *_: None
    )  # merely causal: branches see each other
    with pytest.raises(ModelError, match=r"LlamaForCausalLM, whose log-probs would differ"):
        enable_shared_prefix(build(*MODELS["llama"]))


def test_other_implementations_and_soft_caps_without_cuda_are_refused():
    with pytest.raises(ModelError, match=r"attn_implementation eager"):
        enable_shared_prefix(build(*MODELS["llama"], "eager"))
    gemma2 = build("gemma2", GQA | MIXED | {"head_dim": 8}, "flex_attention")
    with pytest.raises(ModelError, match=r"Gemma2Attention with a soft cap.*layout: padded"):
        enable_shared_prefix(gemma2)
    assert gemma2.config._attn_implementation == "flex_attention"


LORA = AdapterSettings(rank=4, dropout=0.0)
OBJECTIVES = {
    "dpo": (MaskedDPO, preferences),
    "npo": (TokenWeightedNPO, unlearning),
    "sft": (SupervisedFineTuning, instructions),
}


@pytest.mark.parametrize("objective", OBJECTIVES)
def test_training_is_the_same_in_both_layouts(objective, tiny_llama_dir, tmp_path):
    kind, rows = OBJECTIVES[objective]
    runs = []
    for layout in ("padded", "shared_prefix"):
        log = MemoryLogger()
        module = kind(str(tiny_llama_dir), learning_rate=1e-3)
        settings = {"logger": log, "log_every_n_steps": 1, "accumulate_grad_batches": 2}
        trainer(tmp_path, **settings).fit(module, rows(10, layout=layout))
        runs.append((log.values("loss"), weights(module)))
    assert runs[1][0] == pytest.approx(runs[0][0], abs=1e-6) and len(runs[0][0]) == 2
    assert_close_weights(runs[1][1], runs[0][1], atol=2e-5)


@pytest.mark.parametrize("settings", [{"reference": "swap"}, {"adapter": LORA}])
def test_masks_and_adapters_with_checkpointing_train_the_same(settings, tiny_llama_dir, tmp_path):
    losses = []
    for layout in ("padded", "shared_prefix"):
        module = MaskedDPO(
            str(tiny_llama_dir), learning_rate=1e-2, gradient_checkpointing=True, **settings
        )
        log = MemoryLogger()
        mask = [] if "adapter" in settings else [KeyParameterLocalization("random", 0.3)]
        torch.manual_seed(0)
        run = trainer(tmp_path, logger=log, log_every_n_steps=1, callbacks=mask)
        run.fit(module, preferences(10, layout=layout))
        losses.append(log.values("loss"))
    assert losses[1] == pytest.approx(losses[0], abs=1e-5) and len(losses[0]) == 3


def test_a_run_with_a_token_budget_resumes_in_the_middle_of_an_epoch(tiny_llama_dir, tmp_path):
    def fit(folder, **settings):
        log = MemoryLogger()
        saving = ModelCheckpoint(folder, "{step}", every_n_train_steps=1, save_top_k=-1)
        module = MaskedDPO(str(tiny_llama_dir), learning_rate=1e-2)
        data = preferences(
            20, layout="shared_prefix", max_tokens=60, group_by_length=True,
            splits={"validation": preference_rows(3, seed=1)},
        )  # fmt: skip
        run = trainer(
            tmp_path, callbacks=[saving], enable_checkpointing=True, max_epochs=2, logger=log,
            log_every_n_steps=1,
        )  # fmt: skip
        run.fit(module, data, **settings)
        return log.values("loss"), log.values("eval_loss"), weights(module)

    losses, eval_losses, whole = fit(tmp_path / "whole")
    steps = len(losses) // 2
    assert steps == 4 and len(eval_losses) == 2
    middle = steps + 2  # of the second epoch, whose order is another
    resumed, _, ended = fit(tmp_path / "rest", ckpt_path=tmp_path / f"whole/step={middle}.ckpt")
    assert resumed == losses[middle:]
    assert_equal_weights(ended, whole)
