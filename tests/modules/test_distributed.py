"""Two gloo processes under DDP end like one, and send the selected entries alone."""

import json
import os
import socket
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from transformers import LlamaConfig, LlamaForCausalLM

from lit_align.localizers import random_scores
from lit_align.masks import named_shapes, select
from tests.tiny_models import tiny_tokenizer
from tests.training_runs import assert_close_weights, assert_equal_weights, random_mask

ROOT = Path(__file__).resolve().parents[2]
KIB = 1024


def free_port() -> int:
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        return s.getsockname()[1]


def run_ranks(world_size: int, out: Path, objective: str, model: Path, mask: Path | str) -> None:
    out.mkdir()
    port = str(free_port())
    command = [sys.executable, "-m", "tests.modules.distributed_script"]
    command += [objective, str(model), str(mask), str(world_size), str(out)]
    ranks = []
    for rank in range(world_size):
        place = {"LOCAL_RANK": str(rank), "NODE_RANK": "0", "MASTER_PORT": port}
        place |= {"MASTER_ADDR": "127.0.0.1", "WORLD_SIZE": str(world_size)}
        environment = {**os.environ, **place, "OMP_NUM_THREADS": "1"}
        ranks.append(
            subprocess.Popen(
                command,
                cwd=ROOT,
                env=environment if world_size > 1 else None,
                text=True,
                stdout=subprocess.PIPE,
                stderr=subprocess.STDOUT,
            )  # fmt: skip
        )
    try:
        for rank in ranks:
            printed, _ = rank.communicate(timeout=200)
            assert rank.returncode == 0, printed[-4000:]
    finally:
        for rank in ranks:
            rank.kill()


def figures(folder: Path, rank: int = 0) -> dict:
    return json.loads((folder / f"figures-{rank}.json").read_text())


@pytest.mark.parametrize("objective", ["sft", "dpo", "swap", "npo"])
def test_two_processes_equal_one(objective, tiny_llama_dir, tmp_path):
    random_mask(0.3).save(tmp_path / "mask")
    # The mask by gradient scores once, where the first batches go through both ranks.
    mask = "" if objective == "dpo" else tmp_path / "mask"
    for world_size in (1, 2):
        run_ranks(world_size, tmp_path / str(world_size), objective, tiny_llama_dir, mask)
    one, two = figures(tmp_path / "1"), figures(tmp_path / "2")
    assert one["steps"] == two["steps"] == 6
    assert one["mask"] == two["mask"]
    first, second = (load_file(tmp_path / "2" / f"weights-{r}.safetensors") for r in (0, 1))
    assert_equal_weights(first, second)
    assert_close_weights(load_file(tmp_path / "1" / "weights-0.safetensors"), first, atol=1e-6)
    for name in ("loss", "grad_norm", "eval_loss"):
        assert two[name] == pytest.approx(one[name], rel=1e-4), name
    # A filler's tokens are computed, so they count.
    assert two["num_tokens"][:2] == one["num_tokens"][:2]
    records = [
        [json.loads(line) for line in (tmp_path / n / "logps.jsonl").read_text().splitlines()]
        for n in ("1", "2")
    ]
    assert len(records[0]) == len(records[1])
    for a, b in zip(*records, strict=True):
        assert b == pytest.approx(a, rel=1e-4)


@pytest.mark.skipif(not Path("/proc/self/io").exists(), reason="counts bytes by Linux's /proc")
def test_only_selected_entries_are_sent(tmp_path):
    torch.manual_seed(0)
    model = LlamaForCausalLM(
        LlamaConfig(
            vocab_size=4000,
            hidden_size=128,
            intermediate_size=256,
            num_hidden_layers=2,
            num_attention_heads=4,
            num_key_value_heads=2,
            tie_word_embeddings=True,
            pad_token_id=0,
        )  # fmt: skip
    )
    model.save_pretrained(tmp_path / "model")
    tiny_tokenizer().save_pretrained(tmp_path / "model")
    select(random_scores(named_shapes(model), 0), 0.1).save(tmp_path / "mask")
    run_ranks(2, tmp_path / "out", "dpo", tmp_path / "model", tmp_path / "mask")
    dense_bytes = 4 * sum(p.numel() for p in model.parameters())
    for rank in (0, 1):
        found = figures(tmp_path / "out", rank)
        print(found, dense_bytes)
        # A ring of W ranks sends 2 (W − 1) / W of a gradient, here all of it once a step; the
        # selected entries go out once at the start.
        allowed = 1.1 * 4 * found["selected"] * (found["steps"] + 1) + 100 * KIB
        assert found["written_bytes"] < allowed
        assert found["written_bytes"] > 4 * found["selected"] * found["steps"]  # sockets count
        assert allowed < dense_bytes * (found["steps"] + 1) / 8
