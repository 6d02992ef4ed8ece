"""What is said of an ILA run's numbers."""

from typing import Any

from lit_align.pipelines.ila.notes import all_notes


def variant(label: str, *losses: float) -> dict[str, Any]:
    return {
        "label": label, "validation_loss": sum(losses) / len(losses), "lowest": min(losses),
        "highest": max(losses), "validation_losses": list(losses),
    }  # fmt: skip


def ranking(**more: Any) -> dict[str, Any]:
    return {"saturated": False, "ties": 0, "layers": 15, "unscored": []} | more


def notes(**parts: Any) -> list[str]:
    return all_notes({"variants": {}, "stage1": {}, "rankings": {}} | parts)


def test_a_run_that_has_nothing_to_say():
    assert notes(rankings={"dolly": ranking(ties=1)}) == []


def test_one_training_each_is_measured_by_the_random_selections():
    variants = {
        "top_30": variant("top 30 %", 2.0),
        "random_1_freeze_25": variant("random 1", 2.25),
        "random_2_freeze_25": variant("random 2", 2.5),
    }
    (said,) = notes(variants=variants)
    assert "differ by up to 0.25 nats" in said and "not ranked" in said
    (said,) = notes(variants={"top_30": variants["top_30"]})
    assert "are not a ranking" in said


def test_ranges_that_overlap_do_not_rank():
    variants = {
        "a": variant("A", 1.0, 1.5),
        "b": variant("B", 1.25, 2.0),
        "c": variant("C", 1.75, 2.5),
    }
    assert notes(variants=variants) == [
        "The losses of “A” over its seeds overlap with those of “B”: these runs do not rank them."
    ]
    del variants["b"]
    assert notes(variants=variants) == []


def test_a_variant_without_a_validation_loss_is_left_out():
    absent = variant("B", 1.0) | {"validation_loss": None, "validation_losses": []}
    assert notes(variants={"b": absent}) == []


def test_epsilon_met_and_never_met():
    record = {"epsilon": 0.01, "window": 20, "steps": 60, "warmup_steps": 1}
    met, never = notes(stage1={"a": record | {"stable": True}, "b": record | {"stable": False}})
    assert met.startswith("a: ε-stable after 60 steps")
    assert never.startswith("b: ε = 0.01 was never met") and "limit of 60 steps, and" in never
    (short,) = notes(stage1={"c": record | {"stable": False, "warmup_steps": 2}})
    assert "limit of 60 steps (too few to see it: that takes three windows of 20), and" in short


def test_gates():
    layers = [f"l{i}.weight" for i in range(6)]
    said = notes(rankings={"x": ranking(saturated=True, ties=3, unscored=layers)})
    assert "every gate is saturated" in said[0]
    assert "3 of 15 layers share their score" in said[1]
    assert "6 layer(s) (l0.weight, l1.weight, l2.weight, l3.weight and 2 more)" in said[2]


def test_transfer_names_what_has_no_counterpart():
    moved = {"scores": {"a": 1.0}, "unmatched": ["q.weight"], "unused": ["attn.c_attn"]}
    said = notes(transferred=moved)
    assert "1 layer(s) (q.weight) have no counterpart" in said[1]
    assert "no module called attn.c_attn" in said[2]
