import warnings

import pytest
import torch

from lit_align.errors import LocalizationError
from lit_align.localizers import check_cut, select_by_weight_change, weight_change_scores
from lit_align.masks import conv1d_row_axes, select
from tests.tiny_models import save_tiny_model, tiny_model


def moved_model(kind="llama", scale=1e-3):
    """The tiny model of the folder, every entry moved by its own amount; and the moves."""
    model = tiny_model(kind)
    moves = {}
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            before = parameter.clone()
            parameter.add_(torch.randn(parameter.shape) * scale)
            moves[name] = (parameter - before).abs()
    return model, moves


@pytest.mark.parametrize("kind", ["llama", "gpt2", "mixtral"])
def test_scores_are_the_distance_from_the_base(tmp_path, kind):
    folder = save_tiny_model(tmp_path, kind)
    model, moves = moved_model(kind)
    scores = weight_change_scores(folder, model)
    assert list(scores) == list(moves)
    for name, move in moves.items():
        assert torch.equal(scores[name], move), name
    assert select(scores, 0.1) == select(moves, 0.1)


def test_a_second_folder_or_a_mapping_serve_as_well_as_the_model(tmp_path, tiny_llama_dir):
    model, moves = moved_model()
    model.save_pretrained(tmp_path / "trained")
    expected = select(moves, 0.1)
    for trained in (
        tmp_path / "trained",
        str(tmp_path / "trained"),
        dict(model.named_parameters()),
    ):
        assert select(weight_change_scores(tiny_llama_dir, trained), 0.1) == expected


def test_a_base_in_bf16_is_compared_in_fp32(tmp_path):
    base = tiny_model().bfloat16()
    base.save_pretrained(tmp_path)
    model, _ = moved_model()
    scores = weight_change_scores(tmp_path, model)
    for (name, parameter), before in zip(model.named_parameters(), base.parameters(), strict=True):
        assert torch.equal(scores[name], (parameter.detach() - before.float()).abs())


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_trained_weights_in_half_precision_are_refused(tiny_llama_dir, tmp_path, dtype):
    model, _ = moved_model()
    model.to(dtype).save_pretrained(tmp_path)
    for trained in (model, tmp_path):
        with pytest.raises(LocalizationError, match=f"fp32 masters.*{dtype}"):
            weight_change_scores(tiny_llama_dir, trained)


def test_selecting_says_where_the_mask_comes_from(tiny_llama_dir):
    model, moves = moved_model()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        mask = select_by_weight_change(tiny_llama_dir, model, 0.1, base_fingerprint="ab")
    assert mask == select(moves, 0.1) and mask.metadata.method == "weight_change"
    assert mask.metadata.base_fingerprint == "ab" and mask.metadata.extra["threshold"] > 0


def test_rows_of_conv1d_through_select(tmp_path):
    folder = save_tiny_model(tmp_path, "gpt2")
    model, _ = moved_model("gpt2")
    axes = conv1d_row_axes(model)
    mask = select_by_weight_change(
        folder, model, 0.1, scope="per_parameter", granularity="row", row_axes=axes
    )
    selection = mask.selections["transformer.h.0.mlp.c_fc.weight"]
    assert (selection.kind, selection.axis) == ("rows", 1)


def test_too_few_changes_are_an_error_that_names_the_precision(tiny_llama_dir):
    model = tiny_model()
    with torch.no_grad():
        model.model.norm.weight.add_(torch.rand(32))
    with pytest.raises(LocalizationError, match=r"10\.00%.*weight_change above zero.*float32"):
        select_by_weight_change(tiny_llama_dir, model, 0.1)
    mask = select_by_weight_change(tiny_llama_dir, model, 1e-4)
    assert mask.count() == mask.dense("model.norm.weight").sum()


def test_fp32_tensors_that_were_trained_in_bf16_are_found_out(tmp_path):
    base = tiny_model().bfloat16()
    base.save_pretrained(tmp_path)
    trained = base.float()
    with pytest.raises(LocalizationError, match=r"all fit torch\.bfloat16"):
        select_by_weight_change(tmp_path, trained, 0.1)


def test_per_parameter_names_the_parameter_that_did_not_change(tiny_llama_dir):
    model, _ = moved_model()
    with torch.no_grad():
        model.model.norm.weight.copy_(tiny_model().model.norm.weight)
    with pytest.raises(LocalizationError, match=r"'model\.norm\.weight'"):
        select_by_weight_change(tiny_llama_dir, model, 0.1, scope="per_parameter")


def test_ties_at_the_threshold_are_warned_about(tmp_path):
    model = tiny_model()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.zero_()
    model.save_pretrained(tmp_path)
    total = sum(p.numel() for p in model.parameters())
    tied = round(0.008 * total)
    with torch.no_grad():  # 9.5 % of the entries move by different amounts, the next ones alike
        flat = torch.cat([torch.arange(2.0, 2 + round(0.095 * total)), torch.ones(tied)])
        model.model.embed_tokens.weight.view(-1)[: flat.numel()] = flat
    with pytest.warns(UserWarning, match=r"8\.0% as many elements as are selected tie"):
        mask = select_by_weight_change(tmp_path, model, 0.1)
    assert mask.metadata.extra["threshold"] == 1.0
    assert mask.metadata.extra["ties_at_threshold"] == pytest.approx(0.08, abs=1e-3)


def test_few_ties_are_not_worth_a_warning():
    scores = {"a": torch.cat([torch.arange(2.0, 100.0), torch.ones(4)])}
    mask = select(scores, 100 / 102)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        check_cut(mask, lambda: "torch.float32")
    assert mask.metadata.extra["ties_at_threshold"] == 0.04


def test_a_trained_weight_that_is_not_finite_names_the_parameter(tiny_llama_dir):
    model, _ = moved_model()
    with torch.no_grad():
        model.model.norm.weight[3] = torch.inf
    with pytest.raises(LocalizationError, match=r"'model\.norm\.weight'"):
        select_by_weight_change(tiny_llama_dir, model, 0.1)


def test_a_real_model(shared_dir):
    from transformers import AutoModelForCausalLM

    folder = shared_dir / "models" / "stories260K_hf"
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    base = {n: p.detach().clone() for n, p in model.named_parameters()}
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(1 + torch.randn(parameter.shape) * 1e-3)
    expected = {n: (p.detach() - base[n]).abs() for n, p in model.named_parameters()}
    assert select_by_weight_change(folder, model, 0.1) == select(expected, 0.1)
