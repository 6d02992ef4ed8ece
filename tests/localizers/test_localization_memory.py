"""What localisation from model folders needs beside the files: not a tensor of them."""

import json
import math

import numpy as np
import pytest
from transformers import LlamaConfig

from lit_align.localizers import select_by_weight_change
from lit_align.localizers.stored import parameter_shapes
from lit_align.peak_memory import PeakMemory
from lit_align.pipelines.localize import localize

HIDDEN = 1024
EMBEDDING = "model.embed_tokens.weight"


def sparse_model(folder, vocabulary, values=()):
    """A model folder whose weights are zero but for some of the embedding; holes take no disk.

    Args:
        folder: to be made.
        vocabulary: rows of the embedding, of 1024 entries each.
        values: (flat position in the embedding, fp32 numbers).
    """
    config = LlamaConfig(
        vocab_size=vocabulary, hidden_size=HIDDEN, intermediate_size=8, num_hidden_layers=1,
        num_attention_heads=4, num_key_value_heads=1, tie_word_embeddings=True,
    )  # fmt: skip
    config.save_pretrained(folder)
    header, end = {}, 0
    for name, shape in parameter_shapes(folder).items():
        begin, end = end, end + 4 * math.prod(shape)
        header[name] = {"dtype": "F32", "shape": shape, "data_offsets": [begin, end]}
    text = json.dumps(header).encode()
    with (folder / "model.safetensors").open("wb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        start = file.tell() + header[EMBEDDING]["data_offsets"][0]
        file.truncate(file.tell() + end)
        for position, numbers in values:
            file.seek(start + 4 * position)
            file.write(numbers.tobytes())
    return folder


def scattered(vocabulary, blocks=64, length=2000):
    """Blocks of random numbers all over an embedding, up to its last entry."""
    g = np.random.default_rng(0)
    starts = np.linspace(0, vocabulary * HIDDEN - length, blocks).astype(int)
    return [(int(start), g.standard_normal(length, np.float32)) for start in starts]


def localized(folder, vocabulary):
    """MiB that finding the largest half of the changes took, which are the right ones."""
    values = scattered(vocabulary)
    base = sparse_model(folder / "base", vocabulary)
    trained = sparse_model(folder / "trained", vocabulary, values)
    changes = np.abs(np.concatenate([numbers for _, numbers in values]))
    positions = np.concatenate([start + np.arange(len(n)) for start, n in values])
    half = len(changes) // 2
    total = sum(math.prod(shape) for shape in parameter_shapes(base).values())
    with PeakMemory() as peak:
        mask = select_by_weight_change(base, trained, half / total)
    if peak.before_mib is None:
        pytest.skip("this system does not tell the peak memory of a part of a process")
    expected = np.sort(positions[np.argsort(-changes, kind="stable")[:half]])
    assert mask.count() == half
    assert np.array_equal(mask.selections[EMBEDDING].positions().numpy(), expected)
    return peak.mib - peak.before_mib


def test_memory_does_not_grow_with_the_tensors(tmp_path):
    localized(tmp_path / "first", 256)  # imports
    small = localized(tmp_path / "small", 2**12)  # 16 MiB
    large = localized(tmp_path / "large", 2**14)  # 64 MiB, the bitmap of its mask 2
    assert large - small < 16 and large < 48


def test_the_verb_loads_no_model(tmp_path, monkeypatch):
    def load(*_, **__):
        raise AssertionError("loaded the whole model")

    monkeypatch.setattr("transformers.AutoModelForCausalLM.from_pretrained", load)
    values = scattered(64, 8)
    base = sparse_model(tmp_path / "base", 64)
    trained = sparse_model(tmp_path / "trained", 64, values)
    for method in ("weight_change", "random", "magnitude"):
        of = {"trained": str(trained)} if method == "weight_change" else {}
        localize(str(base), str(tmp_path / "mask"), method, ratio=0.001, **of)


@pytest.mark.long
@pytest.mark.timeout(900)
def test_a_tensor_of_a_billion_entries_takes_less_than_a_gibibyte(tmp_path):
    assert localized(tmp_path, 2**20) < 1024  # 4 GiB each; the mask itself takes 128 MiB
