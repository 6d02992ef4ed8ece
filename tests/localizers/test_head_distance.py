"""Scores of heads against an oracle that knows nothing of the package: numpy, fp64, dense CDFs."""

import json
import shutil

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoTokenizer

from lit_align.errors import LocalizationError, MaskError, ModelError
from lit_align.localizers import HeadDistance, head_distance_mask, head_distance_scores
from lit_align.localizers.distances import METRICS
from lit_align.localizers.stored import StoredParameters
from lit_align.masks import HeadLayout, ParameterMask
from tests.attention_models import save_pair

HEAD_DIM, HEADS = 8, 4


def heads_of(model, name: str, block: int) -> list[tuple[np.ndarray, ...]]:
    """(q, k, v) of the query heads, each (head_dim, hidden), cut from the weights by hand."""
    weights = {n: p.detach().double().numpy() for n, p in model.named_parameters()}
    at = f".{block}."
    found = {n.rpartition(".weight")[0].rpartition(".")[2]: w for n, w in weights.items()
             if at in n and n.endswith(".weight")}  # fmt: skip
    if name == "gpt2":
        q, k, v = np.split(found["c_attn"].T, 3)
    elif name == "gpt_neox":
        per_head = found["query_key_value"].reshape(HEADS, 3, HEAD_DIM, -1)
        q, k, v = (per_head[:, i].reshape(HEADS * HEAD_DIM, -1) for i in range(3))
    elif name == "phi3":
        q, k, v = np.split(found["qkv_proj"], [32, 48])
    else:
        q, k, v = (found[f"{letter}_proj"] for letter in "qkv")
    dim = len(q) // HEADS
    shared = len(q) // len(k)
    rows = [slice(h * dim, (h + 1) * dim) for h in range(HEADS)]
    return [(q[rows[h]], k[rows[h // shared]], v[rows[h // shared]]) for h in range(HEADS)]


def distribution(parts: tuple[np.ndarray, ...], representation: str, tau: float) -> np.ndarray:
    q, k, v = parts
    if representation == "qkv":
        entries = np.concatenate([q.ravel(), k.ravel(), v.ravel()])
    else:
        entries = (q.T @ k @ v.T).ravel()  # hidden × head_dim; here the slow way round
    entries = np.exp(entries / tau - (entries / tau).max())
    return entries / entries.sum()


def oracle(metric: str, p: np.ndarray, q: np.ndarray) -> float:
    """By the definition of each metric; the Wasserstein ones by moving earth from left to right."""
    if metric.startswith("wasserstein"):
        carried, work = 0.0, 0.0
        for place in range(len(p) - 1):
            carried += p[place] - q[place]
            work += abs(carried)
        return work / (len(p) - 1) if metric.endswith("normalized") else work
    if metric == "cosine_distance":
        return 1 - (p @ q) / np.sqrt((p @ p) * (q @ q))
    if metric == "euclidean_distance":
        return np.sqrt(((p - q) ** 2).sum())
    p, q = (p + 1e-8) / (1 + 1e-8 * len(p)), (q + 1e-8) / (1 + 1e-8 * len(q))
    if metric == "kl_divergence":
        return (q * np.log(q) - q * np.log(p)).sum()
    m = (p + q) / 2
    return ((p * np.log(p / m)).sum() + (q * np.log(q / m)).sum()) / 2


@pytest.fixture(scope="module")
def pairs(tmp_path_factory):
    """Saved pairs by layout, each made once."""
    made = {}

    def get(name: str):
        if name not in made:
            made[name] = save_pair(tmp_path_factory.mktemp(name), name)
        return made[name]

    return get


@pytest.mark.parametrize("representation", ["qkv", "projection"])
@pytest.mark.parametrize("name", ["mha", "gqa", "mqa", "wide", "gpt2", "gpt_neox", "phi3"])
def test_every_metric_equals_the_oracle(name, representation, pairs):
    base_dir, task_dir, *models = pairs(name)
    for block in (0, 1):
        both = zip(*(heads_of(model, name, block) for model in models), strict=True)
        heads = [[distribution(h, representation, 1.0) for h in pair] for pair in both]
        for metric in METRICS:
            scores = head_distance_scores(base_dir, task_dir, representation, metric)
            assert list(scores) == ["0", "1"]
            expected = [oracle(metric, *pair) for pair in heads]
            found = scores[str(block)].numpy()
            in_fp32 = representation == "qkv" and metric.startswith("wasserstein")
            rtol = 1e-6 if in_fp32 else 1e-9
            np.testing.assert_allclose(found, expected, rtol=rtol, err_msg=metric)


@pytest.mark.parametrize("tau", [0.25, 4.0])
def test_tau_divides_the_entries(tau, pairs):
    base_dir, task_dir, base, task = pairs("gqa")
    found = head_distance_scores(base_dir, task_dir, "projection", "wasserstein", tau)["1"]
    both = zip(heads_of(base, "gqa", 1), heads_of(task, "gqa", 1), strict=True)
    expected = [
        oracle("wasserstein", *(distribution(h, "projection", tau) for h in heads))
        for heads in both
    ]
    np.testing.assert_allclose(found.numpy(), expected, rtol=1e-9)


def transport(places: np.ndarray, _: np.ndarray, p: np.ndarray, q: np.ndarray) -> float:
    """What scipy.stats.wasserstein_distance gives: it divides weights by their sum, in fp64."""
    p, q = (x.astype(float) / x.astype(float).sum() for x in (p, q))
    return float((np.abs(np.cumsum(p) - np.cumsum(q))[:-1] * np.diff(places)).sum())


@pytest.mark.parametrize("distance", ["numpy", "scipy"])
def test_the_public_codes_numbers(distance, tmp_path):
    """Its arithmetic on its bfloat16 weights: fp32 softmax, scipy, fp32 sums; on an MHA model."""
    wasserstein_distance = transport
    if distance == "scipy":
        stats = pytest.importorskip("scipy.stats", reason="scipy is not installed")
        wasserstein_distance = stats.wasserstein_distance
    for folder in save_pair(tmp_path, "mha")[:2]:
        weights = load_file(folder / "model.safetensors")
        weights = {name: tensor.bfloat16() for name, tensor in weights.items()}
        save_file(weights, folder / "model.safetensors", {"format": "pt"})
    stored = [load_file(tmp_path / name / "model.safetensors") for name in ("base", "task")]

    def public(weights, head) -> np.ndarray:
        rows = slice(8 * head, 8 * head + 8)
        names = (f"model.layers.1.self_attn.{letter}_proj.weight" for letter in "qkv")
        return torch.cat([weights[n][rows].flatten() for n in names]).float().softmax(0).numpy()

    def of(metric: str, p: np.ndarray, q: np.ndarray) -> float:
        if metric.startswith("wasserstein"):
            last = 1 if metric.endswith("normalized") else len(p) - 1
            places = np.linspace(0, last, len(p))
            return wasserstein_distance(places, places, p, q)
        if metric == "cosine_distance":
            return 1.0 - np.dot(p, q) / (np.linalg.norm(p) * np.linalg.norm(q))
        p, q = (p + 1e-8) / (p + 1e-8).sum(), (q + 1e-8) / (q + 1e-8).sum()
        if metric == "kl_divergence":
            return np.sum(q * np.log(q / p))
        m = 0.5 * (p + q)
        return 0.5 * np.sum(p * np.log(p / m)) + 0.5 * np.sum(q * np.log(q / m))

    for metric in METRICS:
        if metric == "euclidean_distance":  # the public code has none
            continue
        found = head_distance_scores(tmp_path / "base", tmp_path / "task", "qkv", metric)["1"]
        expected = [of(metric, *(public(w, h) for w in stored)) for h in range(4)]
        np.testing.assert_allclose(found.numpy(), expected, rtol=1e-4, err_msg=metric)


def test_only_the_rows_that_are_compared_are_read(pairs, monkeypatch):
    """One head at a time: no read is larger than a head's rows of one projection."""
    base_dir, task_dir, *_ = pairs("gpt_neox")
    sizes = []
    read_rows = StoredParameters.read_rows

    def spy(self, *args):
        rows = read_rows(self, *args)
        sizes.append(rows.numel())
        return rows

    monkeypatch.setattr(StoredParameters, "read_rows", spy)
    monkeypatch.setattr(StoredParameters, "read", None)
    head_distance_scores(base_dir, task_dir)
    assert set(sizes) == {HEAD_DIM * 32} and len(sizes) == 2 * 2 * 3 * HEADS


# ---- masks ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["gqa", "wide", "gpt2", "phi3", "falcon_gqa"])
def test_the_mask_is_that_of_the_heads_with_the_largest_scores(name, pairs):
    base_dir, task_dir, base, _ = pairs(name)
    scores = head_distance_scores(base_dir, task_dir)
    flat = torch.cat(list(scores.values()))
    best = flat.topk(3).indices.tolist()  # ceil(0.3 · 8)
    mask = head_distance_mask(base_dir, task_dir, 0.3)
    heads = HeadLayout.from_model(base).chosen_heads(mask.selections)
    assert sorted(4 * int(b) + h for b, some in heads.items() for h in some) == sorted(best)
    assert mask.metadata.method == "head_distance" and mask.metadata.ratio == 0.3
    extra = mask.metadata.extra
    assert extra["head_scores"] == {block: each.tolist() for block, each in scores.items()}
    assert extra["threshold"] == flat[best[-1]]
    assert (extra["representation"], extra["metric"], extra["tau"]) == (
        "projection", "wasserstein", 1.0,
    )  # fmt: skip


def test_a_mask_says_what_the_other_weights_do_and_survives_its_file(pairs, tmp_path):
    base_dir, task_dir, *_ = pairs("gqa")
    train = head_distance_mask(base_dir, task_dir, 0.25, rounding="floor")
    freeze = head_distance_mask(base_dir, task_dir, 0.25, others="freeze", o_proj="train")
    assert train.selections["model.embed_tokens.weight"].kind == "all"
    assert freeze.selections["model.embed_tokens.weight"].kind == "none"
    assert freeze.selections["model.layers.0.self_attn.o_proj.weight"].kind == "all"
    freeze.save(tmp_path / "mask")
    loaded = ParameterMask.load(tmp_path / "mask")
    assert loaded == freeze and loaded.metadata == freeze.metadata
    assert loaded.metadata.extra["heads"] == train.metadata.extra["heads"]


# ---- bad input -----------------------------------------------------------------------------------


def test_models_that_cannot_be_compared_are_refused(pairs, tmp_path):
    base_dir, *_ = pairs("gqa")
    with pytest.raises(LocalizationError, match=r"is a LlamaForCausalLM and .* a GPT2LMHead"):
        head_distance_scores(base_dir, pairs("gpt2")[1])
    with pytest.raises(LocalizationError, match=r"'model\.layers\.0\.self_attn\.k_proj\.weight'"):
        head_distance_scores(base_dir, pairs("mqa")[1])
    other = save_pair(tmp_path, "gqa")[1]
    config = json.loads((other / "config.json").read_text())
    config |= {"num_attention_heads": 8, "num_key_value_heads": 4, "head_dim": 4}
    (other / "config.json").write_text(json.dumps(config))
    with pytest.raises(LocalizationError, match=r"has .*'num_attention_heads': 4.*: 8"):
        head_distance_scores(base_dir, other)
    with pytest.raises(ModelError, match="no config"):
        head_distance_scores(base_dir, tmp_path)


def test_tokenizers_that_differ_are_refused(pairs, tmp_path):
    base_dir, task_dir, *_ = pairs("gqa")
    other = shutil.copytree(task_dir, tmp_path / "other")
    tokenizer = AutoTokenizer.from_pretrained(other)
    tokenizer.chat_template = "{{ messages }}"
    tokenizer.save_pretrained(other)
    head_distance_scores(base_dir, other)  # a chat template makes no other ids
    for path in other.glob("*.jinja"):
        path.unlink()
    definition = json.loads((other / "tokenizer.json").read_text())
    vocabulary = definition["model"]["vocab"]
    first, second = sorted(vocabulary, key=vocabulary.get)[10:12]
    vocabulary[first], vocabulary[second] = vocabulary[second], vocabulary[first]
    (other / "tokenizer.json").write_text(json.dumps(definition))
    with pytest.raises(LocalizationError, match=r"tokenizers of .* differ: .* is 1"):
        head_distance_scores(base_dir, other)
    vocabulary[first], vocabulary[second] = vocabulary[second], vocabulary[first]
    definition["pre_tokenizer"]["add_prefix_space"] = True
    (other / "tokenizer.json").write_text(json.dumps(definition))
    with pytest.raises(LocalizationError, match="pre_tokenizer"):
        head_distance_scores(base_dir, other)
    for path in other.glob("tokenizer*"):
        path.unlink()
    head_distance_scores(base_dir, other)  # weights alone: there is nothing to compare


def test_a_copy_of_the_base_chooses_no_head(pairs):
    base_dir, *_ = pairs("gqa")
    with pytest.raises(LocalizationError, match="heads have a head_distance above zero"):
        head_distance_mask(base_dir, base_dir)


def test_weights_that_are_not_finite_are_refused(tmp_path):
    base_dir, task_dir, _, task = save_pair(tmp_path, "gqa")
    with torch.no_grad():
        task.model.layers[1].self_attn.v_proj.weight[3, 5] = torch.nan
    task.save_pretrained(task_dir)
    for metric in METRICS:
        with pytest.raises(LocalizationError, match="block 1 is not finite"):
            head_distance_scores(base_dir, task_dir, metric=metric)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"tau": 0.0}, "tau is 0"),
        ({"tau": float("nan")}, "tau is nan"),
        ({"metric": "l1"}, "metric is one of"),
        ({"representation": "o"}, "representation is one of"),
    ],
)
def test_settings_that_make_no_sense_are_refused(settings, message, pairs):
    base_dir, task_dir, *_ = pairs("gqa")
    with pytest.raises(LocalizationError, match=message):
        HeadDistance(**settings)
    with pytest.raises(LocalizationError, match=message):
        head_distance_scores(base_dir, task_dir, **settings)
    with pytest.raises(MaskError, match="ratio"):
        head_distance_mask(base_dir, task_dir, 1.2)
