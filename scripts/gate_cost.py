"""What ILA's stage 2 costs per batch, beside a forward and backward without weight gradients.

    python scripts/gate_cost.py --model smollm2-135m-instruct-q4 --rows 4 --length 160

They alternate on one model and one batch: the gates are learned, or they are closed and the loss is
taken back through every layer to the embedding's output. `torch` is what a frozen model does by
itself; `same` is that with the matrix products of the gated layers, which on some CPUs are faster
than torch's: the ratio to `same` is what the gates themselves cost. Medians, in milliseconds, of
the clock on the wall, or of the time that the process had a CPU (`--clock cpu`), where others use
the machine too. A ratio is the median of those of single rounds, whose calls stand side by side.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import statistics
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any
from unittest import mock

import torch
from torch import Tensor, nn

from lit_align.batch import PackedBatch
from lit_align.compact.change import Change, LowRank
from lit_align.compact.gated_products import linear
from lit_align.compact.gates import closed_gates, gate, layer_gates
from lit_align.language_model import load_language_model
from lit_align.masks.linear_layers import linear_layers
from lit_align.modules.forward import loss_and_logps
from lit_align_kernels.products import product

RANK, SCALE = 32, 2.0
ALLOWED = {"lora": 1.3, "full": 1.7}


class _SameProducts(torch.autograd.Function):
    """y = x Wᵀ + b with the products of the gated layers; W has no gradient."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        ctx.save_for_backward(weight)
        return linear(x, weight, bias)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        return product(grad, ctx.saved_tensors[0].to(grad.dtype)), None, None


def random_change(model: nn.Module, kind: str) -> Change:
    """A small change of every linear layer: low-rank, or full."""
    layers: dict[str, LowRank | Tensor] = {}
    for name, module in linear_layers(model).items():
        weight: Any = module.weight
        rows, columns = weight.shape if isinstance(module, nn.Linear) else weight.shape[::-1]
        if kind == "full":
            layers[name] = torch.randn_like(weight) * 1e-3
        else:
            a, b = torch.randn(RANK, columns) * 1e-2, torch.randn(rows, RANK) * 1e-2
            layers[name] = LowRank(a, b, SCALE)
    return Change(layers, {})


def random_batch(vocabulary: int, rows: int, length: int, prompt: int) -> PackedBatch:
    """Rows of tokens whose last `length - prompt` are targets."""
    ids = torch.randint(3, vocabulary, (rows, length))
    at = torch.arange(rows * length).view(rows, length)
    targets = length - prompt
    return PackedBatch(
        input_ids=ids,
        position_ids=torch.arange(length).repeat(rows, 1),
        attention_mask=torch.ones_like(ids),
        hidden_index=at[:, prompt - 1 : -1].flatten(),
        target_ids=ids[:, prompt:].flatten(),
        sequence_index=torch.arange(rows).repeat_interleave(targets),
        token_weights=torch.ones(rows * targets),
        sequence_roles=torch.zeros(rows, dtype=torch.int64),
        row_ids=torch.arange(rows),
    )


@contextlib.contextmanager
def _gradient_to_the_embedding(model: Any) -> Iterator[None]:
    hook = model.get_input_embeddings().register_forward_hook(lambda *a: a[2].requires_grad_(True))
    try:
        yield
    finally:
        hook.remove()


def times_ms(
    functions: Mapping[str, Callable[[PackedBatch], None]],
    batch: PackedBatch,
    device: torch.device,
    rounds: int,
    clock: Callable[[], float],
) -> dict[str, list[float]]:
    """Milliseconds of every call; the functions alternate, after a round that is not timed."""
    timed: dict[str, list[float]] = {name: [] for name in functions}
    for i in range(-1, rounds):
        for name, function in functions.items():
            start = clock()
            function(batch)
            if device.type == "cuda":
                torch.cuda.synchronize(device)
            if i >= 0:
                timed[name].append((clock() - start) * 1e3)
    return timed


def ratio(a: Sequence[float], b: Sequence[float]) -> float:
    """Median ratio of calls of the same round."""
    return statistics.median(x / y for x, y in zip(a, b, strict=True))


def steps(
    model: Any, device: torch.device, autocast: bool
) -> dict[str, Callable[[PackedBatch], None]]:
    """Name → one forward and backward."""
    scores = list(layer_gates(model).parameters().values())

    def loss(logps: Tensor, start: int, stop: int) -> Tensor:
        return -logps.sum()

    def gates(batch: PackedBatch) -> None:
        with torch.autocast(device.type, torch.bfloat16, enabled=autocast):
            total, _ = loss_and_logps(model, batch, loss, 1)
        total.backward()
        for score in scores:
            score.grad = None

    def torch_(batch: PackedBatch) -> None:
        with closed_gates(model), _gradient_to_the_embedding(model):
            gates(batch)

    def same(batch: PackedBatch) -> None:
        def forward(self: Any, x: Tensor) -> Tensor:
            return _SameProducts.apply(x, self.weight, self.bias)

        with mock.patch.object(nn.Linear, "forward", forward):
            torch_(batch)

    return {"gates": gates, "torch": torch_, "same": same}


def measure(args: argparse.Namespace, kind: str) -> dict[str, Any]:
    """Medians of one kind of change."""
    device = torch.device(args.device)
    model: Any = load_language_model(args.model)[0].to(device)
    gate(model, random_change(model, kind))
    if args.gradient_checkpointing:
        model.gradient_checkpointing_enable({"use_reentrant": False})
        model.train()
    batch = random_batch(model.config.vocab_size, args.rows, args.length, args.prompt)
    functions = steps(model, device, args.autocast)
    clock = time.process_time if args.clock == "cpu" else time.perf_counter
    timed = times_ms(functions, batch.to(device), device, args.rounds, clock)
    return {
        "kind": kind,
        **{f"{name}_ms": round(statistics.median(values), 1) for name, values in timed.items()},
        "ratio_to_torch": round(ratio(timed["gates"], timed["torch"]), 3),
        "ratio_to_same": round(ratio(timed["gates"], timed["same"]), 3),
        "allowed": ALLOWED[kind],
    }


def main() -> None:
    """Print one line of JSON a kind."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", default="smollm2-135m-instruct-q4")
    parser.add_argument("--kinds", nargs="+", choices=ALLOWED, default=list(ALLOWED))
    parser.add_argument("--rows", type=int, default=4)
    parser.add_argument("--length", type=int, default=160)
    parser.add_argument("--prompt", type=int, default=40, help="tokens of a row without a loss")
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--clock", choices=("wall", "cpu"), default="wall")
    parser.add_argument("--autocast", action="store_true", help="bf16-mixed")
    parser.add_argument("--gradient-checkpointing", action="store_true")
    args = parser.parse_args()
    for kind in args.kinds:
        torch.manual_seed(0)
        print(json.dumps(measure(args, kind)), flush=True)


if __name__ == "__main__":
    main()
