import pytest
import torch

from lit_align.masks import ParameterMask, Selection
from lit_align.masks.table import split_name


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("model.layers.11.self_attn.q_proj.weight", (11, "self_attn.q_proj")),
        ("transformer.h.0.attn.c_attn.bias", (0, "attn.c_attn.bias")),
        ("model.layers.1.mlp.experts.gate_up_proj", (1, "mlp.experts.gate_up_proj")),
        ("model.embed_tokens.weight", (None, "model.embed_tokens")),
        ("weight", (None, "weight")),
        ("0", (None, "0")),
    ],
)
def test_split_name(name, expected):
    assert split_name(name) == expected


def test_tables():
    mask = ParameterMask(
        {
            "h.1.w.weight": Selection.of_rows((4, 5), torch.tensor([2])),
            "emb.weight": Selection.none((6,)),
            "h.0.w.weight": Selection.all((3, 2)),
            "h.1.b": Selection.all((4,)),
        }
    )
    assert mask.table()[0] == {
        "name": "h.1.w.weight",
        "block": 1,
        "module": "w",
        "shape": (4, 5),
        "selected": 5,
        "total": 20,
        "ratio": 0.25,
    }
    assert [row["ratio"] for row in mask.table()] == [0.25, 0.0, 1.0, 1.0]
    assert mask.layer_table() == [
        {"block": None, "selected": 0, "total": 6, "ratio": 0.0},
        {"block": 0, "selected": 6, "total": 6, "ratio": 1.0},
        {"block": 1, "selected": 9, "total": 24, "ratio": 0.375},
    ]
