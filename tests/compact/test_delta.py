"""Deltas give back the trained model, and the base, to the bit."""

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import save_file

from lit_align.compact import (
    Delta,
    apply_delta,
    export_delta,
    links,
    merge,
    restrict,
    revert_delta,
)
from lit_align.compact.state import write_through
from lit_align.errors import DeltaError, MaskError
from lit_align.language_model import load_language_model
from lit_align.masks import ParameterMask, named_shapes, select
from lit_align.optim import MaskedAdamW
from tests.compact.test_restrict import compact_steps
from tests.tiny_models import save_tiny_model, tiny_model, tiny_tokenizer
from tests.training_runs import assert_equal_weights, stored

KINDS = ("llama", "gpt2", "mixtral")
DTYPES = (torch.float32, torch.bfloat16)


def make_mask(model, granularity="element", seed=1, ratio=0.1) -> ParameterMask:
    g = torch.Generator().manual_seed(seed)
    scores = {n: torch.rand(s, generator=g) for n, s in named_shapes(model).items()}
    return select(scores, ratio, granularity=granularity, base_fingerprint=model.base_fingerprint)


def train(model, mask, lr=1e-2):
    restrict(model, mask)
    trainable = [p for p in model.parameters() if p.requires_grad]
    compact_steps(model, 2, MaskedAdamW(trainable, lr=lr, weight_decay=0.1))
    return model


@pytest.fixture(scope="module")
def base_dir(tmp_path_factory):
    """A folder of a kind and dtype, made once."""
    made = {}

    def make(kind: str, dtype: torch.dtype):
        if (kind, dtype) not in made:
            folder = tmp_path_factory.mktemp("bases") / f"{kind}-{dtype}"
            tiny_model(kind).to(dtype).save_pretrained(folder)
            tiny_tokenizer().save_pretrained(folder)
            made[kind, dtype] = folder
        return made[kind, dtype]

    return make


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("granularity", ["element", "row"])
@pytest.mark.parametrize("kind", KINDS)
def test_merge_apply_and_revert_to_the_bit(kind, granularity, dtype, base_dir, tmp_path):
    base = base_dir(kind, dtype)
    model, _ = load_language_model(base, dtype=dtype)
    train(model, make_mask(model, granularity))
    export_delta(model, tmp_path / "delta.safetensors")
    model.save_pretrained(tmp_path / "trained")
    merge(base, tmp_path / "delta.safetensors", tmp_path / "merged")
    assert_equal_weights(stored(tmp_path / "trained"), stored(tmp_path / "merged"))
    assert stored(base).keys() == stored(tmp_path / "merged").keys()
    assert {t.dtype for t in stored(tmp_path / "merged").values()} == {dtype}
    moved = sum(int((t != stored(base)[n]).sum()) for n, t in stored(tmp_path / "merged").items())
    assert moved > 0

    fresh, _ = load_language_model(base, dtype=dtype)
    apply_delta(fresh, tmp_path / "delta.safetensors")
    assert_equal_weights(fresh.state_dict(), model.state_dict())
    revert_delta(fresh, tmp_path / "delta.safetensors")
    untouched, _ = load_language_model(base, dtype=dtype)
    assert_equal_weights(fresh.state_dict(), untouched.state_dict())


@pytest.mark.parametrize("dtype", DTYPES)
def test_a_restricted_model_is_reverted_with_its_trainable_entries(dtype, base_dir, tmp_path):
    base = base_dir("llama", dtype)
    model, _ = load_language_model(base, dtype=dtype)
    train(model, make_mask(model))
    export_delta(model, tmp_path / "d")
    revert_delta(model, tmp_path / "d")
    untouched, _ = load_language_model(base, dtype=dtype)
    assert_equal_weights(model.state_dict(), untouched.state_dict())
    for link in links(model):
        before = link.weight.detach().clone()
        write_through([link])
        assert torch.equal(link.weight, before)


def test_a_second_stage_is_exported_with_the_union(base_dir, tmp_path):
    """N1, then from its delta N2: one delta of N1 | N2 against the base gives the last model."""
    base = base_dir("llama", torch.float32)
    model, _ = load_language_model(base)
    first, second = make_mask(model, seed=1), make_mask(model, "row", seed=2)
    export_delta(train(model, first), tmp_path / "first")
    model, _ = load_language_model(base)
    apply_delta(model, tmp_path / "first")
    train(model, second)
    export_delta(model, tmp_path / "both", first | second)
    model.save_pretrained(tmp_path / "trained")
    merge(base, tmp_path / "both", tmp_path / "merged")
    assert_equal_weights(stored(tmp_path / "trained"), stored(tmp_path / "merged"))


def test_without_a_mask_the_applied_delta_is_exported_too(base_dir, tmp_path):
    base = base_dir("llama", torch.float32)
    model, _ = load_language_model(base)
    first, second = make_mask(model, seed=1), make_mask(model, "row", seed=2)
    export_delta(train(model, first), tmp_path / "first")
    model, _ = load_language_model(base)
    train(apply_delta(model, tmp_path / "first"), second)
    export_delta(model, tmp_path / "both")
    assert Delta.load(tmp_path / "both").mask == first | second
    model.save_pretrained(tmp_path / "trained")
    merge(base, tmp_path / "both", tmp_path / "merged")
    assert_equal_weights(stored(tmp_path / "trained"), stored(tmp_path / "merged"))
    revert_delta(model, tmp_path / "first")
    export_delta(model, tmp_path / "second")
    assert Delta.load(tmp_path / "second").mask == second | (first - first)


def test_a_16_bit_base_trained_in_fp32_is_merged_in_fp32(base_dir, tmp_path):
    base = base_dir("llama", torch.bfloat16)
    model, _ = load_language_model(base, dtype=torch.float32)
    export_delta(train(model, make_mask(model), lr=1e-4), tmp_path / "d")
    model.save_pretrained(tmp_path / "trained")
    merge(base, tmp_path / "d", tmp_path / "merged")
    assert_equal_weights(stored(tmp_path / "trained"), stored(tmp_path / "merged"))


def test_a_wholly_selected_parameter_is_in_the_delta(base_dir, tmp_path):
    base = base_dir("llama", torch.float32)
    model, _ = load_language_model(base)
    train(model, make_mask(model, "layer", ratio=0.5))
    export_delta(model, tmp_path / "d")
    model.save_pretrained(tmp_path / "trained")
    merge(base, tmp_path / "d", tmp_path / "merged")
    assert_equal_weights(stored(tmp_path / "trained"), stored(tmp_path / "merged"))


def test_values_are_final_and_the_base_is_named(base_dir, tmp_path):
    model, _ = load_language_model(base_dir("llama", torch.float32))
    mask = make_mask(model)
    export_delta(train(model, mask), tmp_path / "d")
    delta = Delta.load(tmp_path / "d")
    assert delta.mask == mask
    assert delta.mask.metadata.base_fingerprint == model.base_fingerprint
    for name, values in delta.values.items():
        weight = dict(model.named_parameters())[name].detach()
        assert torch.equal(values, weight[mask.dense(name)]), name


def test_a_delta_of_ten_percent_is_small(tmp_path):
    """Ten percent of fp32 values and one bit an entry: about a seventh of the model."""
    model = tiny_model()
    model.resize_token_embeddings(20_000)
    model.base_fingerprint = "0" * 64
    export_delta(train(model, make_mask(model)), tmp_path / "d")
    total = sum(n.numel() for n in model.state_dict().values()) - model.lm_head.weight.numel()
    size = (tmp_path / "d").stat().st_size
    assert size <= 1.05 * total * (0.1 * 4 + 1.1 / 8)
    assert size <= total * 4 / 6.8


# ---- bad input ---------------------------------------------------------------------------------


@pytest.fixture
def delta_path(base_dir, tmp_path):
    model, _ = load_language_model(base_dir("llama", torch.float32))
    export_delta(train(model, make_mask(model)), tmp_path / "delta.safetensors")
    return tmp_path / "delta.safetensors"


def test_a_truncated_file_is_refused_at_every_length(delta_path, tmp_path):
    data = delta_path.read_bytes()
    damaged = tmp_path / "damaged"
    for length in (0, 5, 100, len(data) // 2, len(data) - 1):
        damaged.write_bytes(data[:length])
        with pytest.raises(DeltaError, match="damaged"):  # the file's name
            Delta.load(damaged)


def test_a_flipped_bit_anywhere_is_refused(delta_path, tmp_path):
    data = delta_path.read_bytes()
    damaged = tmp_path / "damaged"
    for at in torch.randint(0, len(data), (40,), generator=torch.Generator().manual_seed(0)):
        flipped = bytearray(data)
        flipped[int(at)] ^= 1 << int(at) % 8
        damaged.write_bytes(flipped)
        with pytest.raises(DeltaError, match="damaged"):
            Delta.load(damaged)


def test_a_missing_file_a_mask_and_a_model_are_no_deltas(delta_path, base_dir, tmp_path):
    with pytest.raises(DeltaError, match="absent"):
        Delta.load(tmp_path / "absent")
    Delta.load(delta_path).mask.save(tmp_path / "mask")
    with pytest.raises(DeltaError, match="needs"):
        Delta.load(tmp_path / "mask")
    with pytest.raises(DeltaError, match="not a delta"):
        Delta.load(base_dir("llama", torch.float32) / "model.safetensors")


def forge(path, out, change):
    """Rewrite a delta with changed tensors."""
    with safe_open(path, framework="pt") as file:
        tensors = {n: file.get_tensor(n) for n in file.keys()}  # noqa: SIM118
        metadata = file.metadata()
    change(tensors)
    save_file(tensors, out, metadata)
    return out


def test_forged_values_are_refused_by_name(delta_path, tmp_path):
    with safe_open(delta_path, framework="pt") as file:
        name = next(n for n in file.keys() if n.startswith("values."))  # noqa: SIM118
    parameter = name.removeprefix("values.")
    cases = {
        "needs": lambda t: t.pop(name),
        "needs ": lambda t: t.update({name: t[name][:-1].clone()}),
        "I64": lambda t: t.update({name: t[name].long()}),
        "not those": lambda t: t.update({name: t[name] + 1}),
        "does not select": lambda t: t.update({"values.unknown": t[name].clone()}),
    }
    for message, change in cases.items():
        with pytest.raises(DeltaError, match=message) as error:
            Delta.load(forge(delta_path, tmp_path / "forged", change))
        if message.startswith(("needs", "I64")):
            assert parameter in str(error.value)


def test_another_models_delta_is_refused(delta_path, tmp_path):
    other = save_tiny_model(tmp_path / "other", seed=5)
    model, _ = load_language_model(other)
    before = {n: p.detach().clone() for n, p in model.named_parameters()}
    for call in (apply_delta, revert_delta):
        with pytest.raises(DeltaError, match=r"another model.*fingerprint"):
            call(model, delta_path)
    assert all(torch.equal(p, before[n]) for n, p in model.named_parameters())
    with pytest.raises(DeltaError, match="another model"):
        merge(other, delta_path, tmp_path / "out")
    assert not (tmp_path / "out").exists()
    with pytest.raises(DeltaError, match="another model"):
        apply_delta(tiny_model("gpt2"), delta_path)


def test_export_needs_a_mask_of_this_model(tmp_path):
    with pytest.raises(DeltaError, match="not restricted"):
        export_delta(tiny_model(), tmp_path / "d")
    foreign = ParameterMask.full(named_shapes(tiny_model("gpt2")))
    with pytest.raises(MaskError):
        export_delta(tiny_model(), tmp_path / "d", foreign)
    assert not (tmp_path / "d").exists()


def test_revert_from_another_base_is_refused(delta_path, base_dir, tmp_path):
    model, _ = load_language_model(base_dir("llama", torch.float32))
    apply_delta(model, delta_path)
    other = save_tiny_model(tmp_path / "other", seed=5)
    with pytest.raises(DeltaError, match="another model"):
        revert_delta(model, delta_path, other)


def test_revert_without_a_known_base(delta_path):
    with pytest.raises(DeltaError, match="base_dir"):
        revert_delta(tiny_model(), delta_path)
