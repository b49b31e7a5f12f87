"""Every measure goes through one suite, and is right on a case that was planted for it."""

from __future__ import annotations

import copy
import dataclasses
import math
from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

from weft.measures import MEASURES, Measure
from weft.testing_grafts import tiny_decoder
from weft.testing_measures import check_measure, texts


@pytest.mark.parametrize("name", MEASURES)
def test_every_measure_keeps_what_measures_owe(name: str) -> None:
    check_measure(name)


def gaussian(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def moments(x: Tensor) -> dict[str, Tensor]:
    return {"input_moment": x.mT @ x / len(x), "input_mean": x.mean(0)}


def value(name: str, *given: object, **options: object) -> dict:
    return dict(MEASURES[name].value(*given, **{**MEASURES[name].defaults, **options}))


def pareto(alpha: float, n: int = 400) -> Tensor:
    """A diagonal matrix whose squares follow an exact power law."""
    uniform = (torch.arange(1, n + 1, dtype=torch.float64) - 0.5) / n
    return torch.diag((uniform ** (-1 / (alpha - 1))).sqrt())


def planted_farms() -> None:
    tails = [value("farms", pareto(alpha))["alpha"] for alpha in (2.0, 3.0, 4.0)]
    assert tails == pytest.approx([2.0, 3.0, 4.0], rel=0.1)


def planted_power_law() -> None:
    assert value("power-law", pareto(2.5))["alpha_whole"] == pytest.approx(2.5, rel=0.05)


def planted_w_pca() -> None:
    x = gaussian(300, 3) @ gaussian(3, 20, seed=1) + 5
    assert value("w-pca", moments(x))["components"] <= 3, "data of rank 3, far from the origin"
    even = torch.linalg.qr(gaussian(400, 40))[0] * 20
    even -= even.mean(0)
    found = value("w-pca", moments(even), eta=0.5)
    assert found["components_share"] == pytest.approx(0.5, abs=0.06)
    R = torch.linalg.qr(gaussian(20, 20, seed=2))[0]
    turned = {**moments(x @ R)}
    assert value("w-pca", turned) == value("w-pca", moments(x)), "a rotation changes nothing"
    counts = [value("w-pca", moments(gaussian(300, 20)), eta=eta)["components"] for eta in (0.5, 0.9, 0.99, 1.0)]
    assert counts == sorted(counts) and counts[-1] == 20


def planted_hidden_covariance() -> None:
    x = gaussian(20_000, 8)
    alone = value("hidden-covariance", moments(x))
    assert alone["hidden_score"] == pytest.approx(-1, abs=0.01) and alone["redundancy"] < 1e-3
    twice = torch.cat([x, 3 * x[:, :1] - 1], 1)
    found = value("hidden-covariance", moments(twice))
    assert found["hidden_score"] < -1e3 and found["redundancy"] == pytest.approx(2 / (9 * 8), rel=0.01)
    scaled = value("hidden-covariance", moments(x * torch.arange(1, 9) + 7))
    assert scaled["hidden_score"] == pytest.approx(alone["hidden_score"], rel=1e-6), "no scale, no shift"
    dead = value("hidden-covariance", moments(torch.cat([x, torch.ones(len(x), 1)], 1)))
    assert dead["redundancy"] == pytest.approx(alone["redundancy"], rel=1e-6), "a constant unit is left out"


def planted_gradient_quality() -> None:
    one = value("gradient-quality", torch.ones(6, 5), torch.ones(6, 4))
    assert one["gradient_rank"] == pytest.approx(1) and one["gradient_nuclear"] == pytest.approx(6 * math.sqrt(20))
    even = value("gradient-quality", torch.eye(7), 3 * torch.eye(7))
    assert even["gradient_rank"] == pytest.approx(7) and even["gradient_fullness"] == pytest.approx(1)
    masked = torch.cat([3 * torch.eye(7), torch.zeros(5, 7)])
    assert value("gradient-quality", gaussian(12, 7), masked)["gradient_fullness"] <= 1
    assert math.isnan(value("gradient-quality", torch.ones(3, 4), torch.zeros(3, 4))["gradient_rank"])


def planted_matrix_nuclear_norm() -> None:
    N, d = 60, 6
    H = torch.eye(d, dtype=torch.float64).repeat(N // d, 1)
    X = H - 1 / d
    X = X / X.norm(dim=1, keepdim=True)
    found = value("matrix-nuclear-norm", H)
    exact = float(torch.linalg.svdvals(X).sum()) / N
    assert found["nuclear_norm_exact"] == pytest.approx(exact, rel=1e-6)
    assert found["matrix_nuclear_norm"] == pytest.approx(float(X.norm(dim=0).sum()) / N, rel=1e-9)
    signs = torch.tensor([[1.0, 1], [1, -1], [-1, 1], [-1, -1]], dtype=torch.float64)  # orthogonal columns
    both = value("matrix-nuclear-norm", signs)
    assert both["matrix_nuclear_norm"] == pytest.approx(both["nuclear_norm_exact"], rel=1e-9)
    assert both["matrix_entropy"] == pytest.approx(1)


def planted_intrinsic_dimension() -> None:
    line = torch.linspace(0, 1, 300, dtype=torch.float64)[:, None] ** 1.5 @ gaussian(1, 12)
    assert value("intrinsic-dimension", line)["dimension_mle"] == pytest.approx(1, abs=0.15)
    sizes = []
    for d in (2, 5, 10):
        cube = torch.rand(400, d, generator=torch.Generator().manual_seed(d), dtype=torch.float64)
        Q = torch.linalg.qr(gaussian(32, d))[0]
        sizes.append(value("intrinsic-dimension", cube @ Q.mT))
    for key, low in (("dimension_two_nn", 0.75), ("dimension_mle", 0.7)):
        assert [s[key] for s in sizes] == sorted(s[key] for s in sizes)
        assert all(low * d < s[key] < 1.15 * d for s, d in zip(sizes, (2, 5, 10), strict=True)), (key, sizes)


def planted_ppl_sparsity() -> None:
    model = tiny_decoder()
    down = {name: m for name, m in model.named_modules() if name.endswith("down_proj")}
    for layer in down.values():
        layer.weight.data[:, ::2] = 0  # half of the neurons write nothing
    found = value("ppl-sparsity", model, texts(), percent=1e-9)
    assert all(found[name]["sparsity"] >= 0.5 for name in down) and found[""]["ppl_ratio"] <= 1 + 1e-6
    loose = value("ppl-sparsity", model, texts(), percent=5.0)
    assert loose[""]["ppl_sparsity"] >= found[""]["ppl_sparsity"] and 1 <= loose[""]["ppl_ratio"] <= 1.05


def planted_drift() -> None:
    W0 = gaussian(20, 30)
    found = value("drift", W0 + gaussian(20, 1, seed=1) @ gaussian(1, 30, seed=2), W0)
    assert found["drift_rank"] == pytest.approx(1, rel=1e-6)


def planted_intruder_dimensions() -> None:
    W0, u, v = gaussian(64, 64) / 8, *(nn.functional.normalize(gaussian(64, seed=s), dim=0) for s in (1, 2))
    assert [value("intruder-dimensions", W0 + s * torch.outer(u, v), W0)["intruders"] for s in (0, 4)] == [0, 1]


def planted_weight_matching() -> None:
    model = tiny_decoder()
    other = copy.deepcopy(model)
    reorder(other, seed=3)
    x = torch.randint(3, 32, (2, 9))
    torch.testing.assert_close(other(x).logits, model(x).logits, msg="what was planted keeps the function")
    found = value("weight-matching", model, other)
    assert found[""]["units_moved"] > 0.5 and found[""]["distance_saved"] == pytest.approx(1, abs=1e-9)
    assert all(row["matched"] == pytest.approx(0, abs=1e-6) for name, row in found.items() if name)
    same = value("weight-matching", model, copy.deepcopy(model))
    assert same[""] == {"units_moved": 0.0, "distance_saved": 0.0}


def reorder(model: nn.Module, seed: int) -> None:
    """Permute neurons, key-value heads, and the query heads of each, of a tiny decoder: four heads on two of 8."""
    generator = torch.Generator().manual_seed(seed)
    for block in model.model.layers:
        mlp, attention = block.mlp, block.self_attn
        p = torch.randperm(mlp.down_proj.in_features, generator=generator)
        for layer in (mlp.gate_proj, mlp.up_proj):
            layer.weight.data = layer.weight.data[p]
        mlp.down_proj.weight.data = mlp.down_proj.weight.data[:, p]
        kv, width = torch.tensor([1, 0]), 8
        heads = torch.tensor([3, 2, 0, 1])  # the heads of group 1, turned round, then those of group 0
        wide = {n: (o[:, None] * width + torch.arange(width)).flatten() for n, o in (("kv", kv), ("q", heads))}
        for layer, kind in ((attention.q_proj, "q"), (attention.k_proj, "kv"), (attention.v_proj, "kv")):
            layer.weight.data = layer.weight.data[wide[kind]]
        attention.o_proj.weight.data = attention.o_proj.weight.data[:, wide["q"]]


def planted_lora_limits() -> None:
    model = tiny_decoder()
    found = value("lora-limits", model, texts())
    grown = copy.deepcopy(model)
    for block in grown.model.layers:
        block.self_attn.q_proj.weight.data *= 3
    first = "model.layers.0.self_attn.q_proj"  # what a later layer reads has changed as well
    more = value("lora-limits", grown, texts())
    for key, times in (("logit_bound", 3), ("query_max", 3), ("key_max", 1)):
        assert more[first][key] == pytest.approx(times * found[first][key], rel=1e-5)
    for block in grown.model.layers:
        block.self_attn.k_proj.weight.data *= 0
    none = value("lora-limits", grown, texts())
    assert none[""]["logits_largest"] == 0 and none[""]["mild_heads_share"] == 1 and none[first]["degree"] == 0


def planted_superposition() -> None:
    basis = torch.linalg.qr(gaussian(24, 24))[0]
    assert value("superposition", basis)["overlap_random"] < 1e-9
    twice = value("superposition", torch.cat([basis, basis]))["overlap"]
    assert twice == pytest.approx(24 / (48 * 47 / 2))  # one pair in so many is parallel


def planted_atoms() -> None:
    basis = torch.linalg.qr(gaussian(24, 24))[0]
    leaning = basis.clone()
    leaning[:, 1] = 0.6 * basis[:, 0] + 0.8 * basis[:, 1]
    assert value("atoms", basis)["coherence"] < 1e-9
    assert value("atoms", leaning)["coherence"] == pytest.approx(0.6)


def planted_control_theory() -> None:
    model = tiny_decoder()
    first = "model.layers.0.self_attn.v_proj"
    before = value("control-theory", model)[first]
    model.get_submodule(first).weight.data *= 3
    model.get_submodule("model.layers.0.self_attn.k_proj").weight.data *= 2
    after = value("control-theory", model)[first]
    assert [after[key] / before[key] for key in before] == pytest.approx([3, 2], rel=1e-5)


def planted_talking_heads() -> None:
    model = tiny_decoder(blocks=3)
    first, last = (model.model.layers[i].self_attn for i in (0, 2))
    before = value("talking-heads", model)["model.layers.0.self_attn.o_proj"]
    written = torch.linalg.svd(first.o_proj.weight[:, :8] @ first.v_proj.weight[:8])[0][:, 0].detach()
    last.v_proj.weight.data[8:] = torch.outer(torch.ones(8), written)  # its second pair of heads reads nothing else
    after = value("talking-heads", model)["model.layers.0.self_attn.o_proj"]
    assert after["channel"] == pytest.approx(32**0.5, rel=1e-4) and after["channel"] > 2 * before["channel"]
    assert after["outlier"] > before["outlier"] and after["composition"] > before["composition"]


def planted_high_dim_dynamics() -> None:
    x = gaussian(100, 5) @ torch.linalg.qr(gaussian(20, 20))[0][:5]
    assert value("high-dim-dynamics", moments(x))["frozen_share"] == pytest.approx(15 / 20)


def planted_hash_encoders() -> None:
    model = tiny_decoder()
    first = "model.layers.0.mlp.gate_proj"
    model.get_submodule(first).weight.data[:4] = 0  # never above 0
    found = value("hash-encoders", model, texts())[first]
    assert found["constant_units"] >= 4 / model.get_submodule(first).out_features


PLANTED: dict[str, Callable[[], None]] = {
    "farms": planted_farms,
    "power-law": planted_power_law,
    "w-pca": planted_w_pca,
    "hidden-covariance": planted_hidden_covariance,
    "gradient-quality": planted_gradient_quality,
    "ppl-sparsity": planted_ppl_sparsity,
    "lora-limits": planted_lora_limits,
    "matrix-nuclear-norm": planted_matrix_nuclear_norm,
    "intrinsic-dimension": planted_intrinsic_dimension,
    "drift": planted_drift,
    "intruder-dimensions": planted_intruder_dimensions,
    "weight-matching": planted_weight_matching,
    "superposition": planted_superposition,
    "atoms": planted_atoms,
    "control-theory": planted_control_theory,
    "talking-heads": planted_talking_heads,
    "high-dim-dynamics": planted_high_dim_dynamics,
    "hash-encoders": planted_hash_encoders,
}


@pytest.mark.parametrize("name", MEASURES)
def test_what_was_planted_is_found(name: str) -> None:
    PLANTED[name]()


def test_a_measure_that_breaks_its_word_is_told_so() -> None:
    measure = MEASURES["drift"]
    broken: dict[str, Measure] = {
        "record": dataclasses.replace(measure, name="a", cost=""),
        "complete": dataclasses.replace(measure, name="b", reads={"drift": "half"}),
        "options": dataclasses.replace(MEASURES["intruder-dimensions"], name="c", defaults={}),
    }
    for property_, wrong in broken.items():
        with pytest.raises(AssertionError, match=f"the property '{property_}' does not hold"):
            check_measure(wrong)
    with pytest.raises(ValueError, match="is of 'nothing', not of one of matrix"):
        dataclasses.replace(measure, of="nothing")
