"""What training changed, written and read again: adapters, deltas, task models."""

import shutil

import pytest
import torch
from torch import nn

from lit_align.compact import AdapterSettings, add_adapters, restrict, trainable
from lit_align.compact.change import Change, change_checksum, read_change, save_change
from lit_align.compact.low_rank import LowRank
from lit_align.compact.write_through import sync
from lit_align.errors import DeltaError, LocalizationError, MaskError, ModelError
from lit_align.language_model import load_language_model, save_language_model
from lit_align.masks import MaskMetadata, ParameterMask, named_shapes
from lit_align.masks.granularity import Selection
from lit_align.masks.linear_layers import linear_layers
from tests.tiny_models import save_tiny_model, tiny_model, tiny_tokenizer

UP = "model.layers.0.mlp.up_proj.weight"


@torch.no_grad()
def move(model: nn.Module, size: float = 0.1) -> None:
    """As training would: everything that trains takes a step."""
    g = torch.Generator().manual_seed(3)
    for _, parameter in trainable(model):
        parameter.add_(size * torch.randn(parameter.shape, generator=g))
    sync(model)


def load(folder):
    return load_language_model(folder)[0]


def assert_gives(change: Change, base: nn.Module, trained: nn.Module) -> None:
    """base + change = trained, up to the rounding of one addition."""
    final = dict(trained.named_parameters())
    for name, parameter in base.named_parameters():
        if name in change.layers:
            torch.testing.assert_close(
                parameter + change.layers[name], final[name], rtol=1e-6, atol=1e-7
            )
        elif name in change.others:
            assert torch.equal(change.others[name], final[name])
        else:
            assert torch.equal(parameter, final[name])


def test_a_full_fit(tiny_llama_dir, tmp_path):
    model = load(tiny_llama_dir)
    move(model)
    folder = save_change(model, tmp_path / "change")
    assert [f.name for f in folder.iterdir()] == ["delta.safetensors"]
    base = load(tiny_llama_dir)
    change = read_change(folder, base)
    assert set(change.layers) == set(linear_layers(base))
    assert set(change.others) == {n for n in named_shapes(base) if "norm" in n}
    assert_gives(change, base, model)


def test_a_restricted_fit_changes_the_layers_of_its_mask(tiny_llama_dir, tmp_path):
    model = load(tiny_llama_dir)
    shapes = named_shapes(model)
    selections = {n: Selection.none(s) for n, s in shapes.items()}
    selections[UP] = Selection.of_rows(shapes[UP], torch.tensor([2, 5]))
    selections["model.norm.weight"] = Selection.all(shapes["model.norm.weight"])
    restrict(model, ParameterMask(selections, MaskMetadata(granularity="row")))
    move(model)
    folder = save_change(model, tmp_path / "change")
    base = load(tiny_llama_dir)
    change = read_change(folder, base)
    assert list(change.layers) == [UP] and list(change.others) == ["model.norm.weight"]
    assert change.layers[UP].abs().sum(1).nonzero().flatten().tolist() == [2, 5]
    original = dict(base.named_parameters())[UP].detach() + change.layers[UP]
    torch.testing.assert_close(original, model.model.layers[0].mlp.up_proj.weight.detach())


def test_adapters(tiny_llama_dir, tmp_path):
    model = load(tiny_llama_dir)
    add_adapters(model, AdapterSettings(rank=4, alpha=8))
    move(model)
    folder = save_change(model, tmp_path / "change")
    assert (folder / "adapter_config.json").is_file()
    change = read_change(folder, load(tiny_llama_dir))
    assert len(change.layers) == 15 and not change.others
    assert all(isinstance(c, LowRank) and c.scale == 2.0 for c in change.layers.values())


@pytest.mark.parametrize("kind", ["llama", "gpt2"])
def test_a_task_model(kind, tmp_path):
    base_dir = save_tiny_model(tmp_path / "base", kind)
    task = load(base_dir)
    move(task)
    save_language_model(task, tiny_tokenizer(), tmp_path / "task")
    base = load(base_dir)
    change = read_change(tmp_path / "task", base)
    assert set(change.layers) == set(linear_layers(base))
    assert_gives(change, base, task)


def test_a_task_model_of_another_shape_or_architecture(tiny_llama_dir, tmp_path):
    base = load(tiny_llama_dir)
    save_tiny_model(tmp_path / "gpt2", "gpt2")
    with pytest.raises(LocalizationError, match=r"LlamaForCausalLM and .* GPT2LMHeadModel"):
        read_change(tmp_path / "gpt2", base)
    config = tiny_model().config
    config.intermediate_size = 64
    type(base)(config).save_pretrained(tmp_path / "wider")
    with pytest.raises(LocalizationError, match=r"mlp.gate_proj.weight.*\(56, 32\).*\(64, 32\)"):
        read_change(tmp_path / "wider", base)


def test_nothing_changed_or_nothing_there(tiny_llama_dir, tmp_path):
    base = load(tiny_llama_dir)
    with pytest.raises(ModelError, match="no linear layer differs"):
        read_change(tiny_llama_dir, base)
    with pytest.raises(ModelError, match="no linear layer differs"):
        read_change(save_change(load(tiny_llama_dir), tmp_path / "same"), base)
    with pytest.raises(ModelError, match=r"neither adapters .* nor a delta .* nor a model"):
        read_change(tmp_path, base)


def test_a_change_of_another_base_and_a_damaged_one(tiny_llama_dir, tmp_path):
    model = load(tiny_llama_dir)
    move(model)
    folder = save_change(model, tmp_path / "change")
    other = load(save_tiny_model(tmp_path / "other", seed=5))
    with pytest.raises(MaskError, match="fingerprint"):
        read_change(folder, other)
    path = folder / "delta.safetensors"
    whole = path.read_bytes()
    path.write_bytes(whole[:-100])
    with pytest.raises(DeltaError, match=r"delta\.safetensors"):
        read_change(folder, load(tiny_llama_dir))
    path.write_bytes(whole[:-1] + bytes([whole[-1] ^ 1]))
    with pytest.raises(DeltaError, match="damaged"):
        read_change(folder, load(tiny_llama_dir))


def test_checksums_tell_changes_apart(tiny_llama_dir, tmp_path):
    found = []
    for size in (0.1, 0.2):
        model = load(tiny_llama_dir)
        move(model, size)
        found.append(change_checksum(save_change(model, tmp_path / str(size))))
        save_language_model(model, tiny_tokenizer(), tmp_path / f"model-{size}")
        found.append(change_checksum(tmp_path / f"model-{size}"))
    assert len(set(found)) == 4
    copied = shutil.copytree(tmp_path / "0.1", tmp_path / "copy")
    assert change_checksum(copied) == found[0]


def test_a_16_bit_base_takes_the_change_in_its_own_dtype(tiny_llama_dir, tmp_path):
    model = load(tiny_llama_dir)
    move(model)
    folder = save_change(model, tmp_path / "change")
    base = load_language_model(tiny_llama_dir, dtype=torch.bfloat16)[0]
    change = read_change(folder, base)
    assert {c.dtype for c in change.layers.values()} == {torch.bfloat16}
    found = base.model.layers[0].mlp.up_proj.weight.float() + change.layers[UP].float()
    expected = model.model.layers[0].mlp.up_proj.weight
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-3)


def test_a_change_of_one_kind_does_not_hide_one_of_the_other(tmp_path):
    """Of both in a folder, one would be read and the other not."""
    plain, adapted = tiny_model(), tiny_model()
    add_adapters(adapted, AdapterSettings(rank=2))
    for first, second in ((plain, adapted), (adapted, plain)):
        folder = save_change(first, tmp_path / type(first).__name__ / str(first is plain))
        before = sorted(path.name for path in folder.iterdir())
        with pytest.raises(ModelError, match="replace"):
            save_change(second, folder)
        assert sorted(path.name for path in folder.iterdir()) == before
