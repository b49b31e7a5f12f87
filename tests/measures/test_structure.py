"""Measures of overlap, coherence, learning directions, gains and codes, on what was planted for them."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor
from transformers import Qwen3NextConfig, Qwen3NextForCausalLM

from tests.methods.glued import glued
from weft.errors import WeftError
from weft.measures import MEASURES
from weft.measures.control_theory import gains
from weft.measures.hash_encoders import Codes
from weft.measures.talking_heads import scores
from weft.testing_grafts import tiny_decoder
from weft.verbs.measuring import chosen


def gaussian(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def value(name: str, *given: object) -> dict[str, float]:
    return dict(MEASURES[name].value(*given, **MEASURES[name].defaults))


def test_rows_overlap_as_random_orthogonal_and_simplex_ones_do() -> None:
    found = value("superposition", gaussian(2000, 64))
    assert found["overlap_random"] == pytest.approx(1, rel=0.03)
    assert value("superposition", 3 * torch.linalg.qr(gaussian(64, 64))[0])["overlap"] < 1e-12
    m = 7
    simplex = torch.eye(m + 1, dtype=torch.float64) - 1 / (m + 1)
    simplex = torch.linalg.svd(simplex)[0][:, :m] * 1.0
    assert value("superposition", simplex)["overlap"] == pytest.approx(1 / m**2)
    W = gaussian(30, 12)
    w = W / W.norm(dim=1, keepdim=True)
    pairs = [float(w[i] @ w[j]) ** 2 for i in range(30) for j in range(i)]
    assert value("superposition", W)["overlap"] == pytest.approx(math.fsum(pairs) / len(pairs))
    assert value("superposition", W + 5)["overlap_centred"] == pytest.approx(
        value("superposition", W)["overlap_centred"]
    )
    padded = torch.cat([W, torch.zeros(4, 12)])
    assert value("superposition", padded)["overlap"] == pytest.approx(value("superposition", W)["overlap"])


def test_coherence_is_that_of_the_two_most_alike_columns(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("weft.measures.atoms._BLOCK", 7)
    D = gaussian(16, 40)
    d = D / D.norm(dim=0)
    most = max(abs(float(d[:, i] @ d[:, j])) for i in range(40) for j in range(i))
    found = value("atoms", D)
    assert found["coherence"] == pytest.approx(most) and most >= found["coherence_floor"]
    assert found["unique_sparsity"] == max(k for k in range(1, 9) if k < (1 + 1 / most) / 2)
    assert value("atoms", torch.eye(8))["unique_sparsity"] == 8
    assert value("atoms", torch.cat([D, -2 * D[:, :1]], 1))["coherence"] == pytest.approx(1)


def test_the_floor_of_coherence_is_that_of_a_simplex() -> None:
    corners = torch.eye(6, dtype=torch.float64) - 1 / 6
    simplex = torch.linalg.svd(corners)[2][:5] @ corners  # six directions in five dimensions, as far apart as can be
    found = value("atoms", simplex)
    assert found["coherence_floor"] == pytest.approx(1 / 5) == found["coherence"]


def test_no_step_moves_a_weight_where_there_are_no_inputs() -> None:
    x = gaussian(6, 20)
    found = value("high-dim-dynamics", {"input_moment": x.mT @ x / 6})
    assert found["frozen_share"] == pytest.approx(14 / 20) and 0 < found["freedom"] < 6
    louder = value("high-dim-dynamics", {"input_moment": 49 * x.mT @ x / 6})
    assert louder == pytest.approx(found), "inputs of another size learn the same directions, the ridge being relative"
    planted = value("high-dim-dynamics", {"input_moment": torch.diag(torch.tensor([3.0, 1, 4, 2]))})
    freedom = sum(v / (v + 0.01 * 2.5) for v in (1, 2, 3, 4))
    assert planted == pytest.approx({"frozen_share": 0, "freedom": freedom, "slowest": 1 / 2.5})
    whole = value("high-dim-dynamics", {"input_moment": torch.eye(20)})
    assert whole == {"frozen_share": 0.0, "freedom": pytest.approx(20 / 1.01), "slowest": 1.0}


def test_no_prompt_moves_a_head_beyond_the_bound() -> None:
    d, width, k, fixed = 12, 4, 2, 5
    worst = 0.0
    for seed in range(200):
        W_q, W_k, W_v = gaussian(3, width, d, seed=seed) * 0.3
        x, u = gaussian(fixed, d, seed=seed + 1000), 2 * gaussian(k, d, seed=seed + 2000)
        M = float(torch.cat([x, u]).norm(dim=1).max())
        q = W_q @ x[0]
        own, given = ((q @ (W_k @ t.mT) / math.sqrt(width)).exp() for t in (x, u))
        D, before = float(own.sum()), own @ (x @ W_v.mT) / own.sum()
        after = (own @ (x @ W_v.mT) + given @ (u @ W_v.mT)) / (own.sum() + given.sum())
        off = after - (after @ before) / (before @ before) * before
        a = float(gains(W_q, width) * gains(W_k, width)) / math.sqrt(width) * M**2
        bound = float(gains(W_v, width)) * M * k * math.exp(a) / (D + k * math.exp(a))
        worst = max(worst, float(off.norm()) / bound)
    assert 0.05 < worst <= 1


def test_gains_are_the_largest_singular_values_of_heads() -> None:
    model = tiny_decoder()
    attention = model.model.layers[1].self_attn
    q, k, v = (
        max(float(torch.linalg.svdvals(head)[0]) for head in layer.weight.detach().double().split(8))
        for layer in (attention.q_proj, attention.k_proj, attention.v_proj)
    )
    row = value("control-theory", model)["model.layers.1.self_attn.v_proj"]
    assert row == pytest.approx({"value_gain": v, "score_gain": q * k / math.sqrt(8)}, rel=1e-6)


def test_the_gate_of_a_head_is_none_of_its_queries() -> None:
    common = dict.fromkeys(("hidden_size", "intermediate_size"), 32) | {"num_hidden_layers": 1, "vocab_size": 64}
    heads = {"num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 8, "layer_types": ["full_attention"]}
    model = Qwen3NextForCausalLM(Qwen3NextConfig(**common, **heads, num_experts=2, num_experts_per_tok=1))
    before = value("control-theory", model)
    with torch.no_grad():
        model.model.layers[0].self_attn.q_proj.weight.view(4, 2, 8, 32)[:, 1].mul_(100)
    assert value("control-theory", model) == before


def test_neurons_of_a_gate_and_what_it_gates_in_one_matrix_are_those_of_two() -> None:
    apart, ids = tiny_decoder(), torch.arange(3, 15)[None]
    one, moved = glued(apart), glued(apart)
    batch = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
    codes = value("hash-encoders", apart, [batch])
    assert value("hash-encoders", one, [batch]) == {
        name.replace("gate_proj", "gate_up_proj"): figures for name, figures in codes.items()
    }
    mlp = moved.model.layers[1].mlp
    with torch.no_grad():
        for matrix in (*mlp.gate_up_proj.weight.chunk(2), mlp.down_proj.weight.mT):
            matrix[[0, 3]] = matrix[[3, 0]]
    found = value("weight-matching", moved, one)
    units = mlp.down_proj.in_features
    for name in ("gate_up_proj", "down_proj"):
        assert found[f"model.layers.1.mlp.{name}"] == {"moved": 2 / units, "matched": 0.0}


def test_codes_are_counted_as_they_are_told_apart() -> None:
    y, codes = gaussian(500, 6), Codes()
    y[:, 0], y[:, 1] = 1.0, -1.0  # 4 bits are left: 16 codes
    codes.add(y[:200])
    codes.add(y[200:])
    found = codes.figures()
    assert found["codes"] == pytest.approx(len(torch.unique(y > 0, dim=0)) / 500) and len(codes.codes) == 16
    assert found["constant_units"] == pytest.approx(2 / 6)
    assert found["firing"] == pytest.approx(float((y > 0).double().mean()))


def test_padding_has_no_code() -> None:
    model, ids = tiny_decoder(), torch.arange(3, 15)[None]
    alone = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
    padded = {key: torch.nn.functional.pad(t, (0, 5)) for key, t in alone.items()}
    assert value("hash-encoders", model, [padded]) == value("hash-encoders", model, [alone])


def test_options_reach_the_measures_that_have_them() -> None:
    farms, law = chosen(["farms", "power-law"], pair=False, data=False, options={"block": 50})
    assert farms.defaults["block"] == 50 and law.defaults == MEASURES["power-law"].defaults
    with pytest.raises(WeftError, match="option of these measures.*blok"):
        chosen(["farms"], pair=False, data=False, options={"blok": 50})


def whole_heads(model: torch.nn.Module, layer: int) -> list[Tensor]:
    """O V (d, d) of each head, the norm before it written out: what the measure never makes."""
    block = model.model.layers[layer]
    attention, norm = block.self_attn, block.input_layernorm
    d, width = 32, 8
    V = attention.v_proj.weight.double() @ torch.diag(norm.weight.double())
    if isinstance(norm, torch.nn.LayerNorm):
        V = V @ (torch.eye(d, dtype=torch.float64) - 1 / d)
    O = attention.o_proj.weight.double()
    return [O[:, width * h :][:, :width] @ V[width * (h // 2) :][:width] for h in range(4)]


@pytest.mark.parametrize("centred", [False, True])
@torch.no_grad()
def test_heads_talk_as_their_whole_matrices_do(centred: bool) -> None:
    model = tiny_decoder(blocks=3)
    for block in model.model.layers:
        if centred:
            block.input_layernorm = torch.nn.LayerNorm(32)
        block.input_layernorm.weight.copy_(1 + 0.5 * gaussian(32).sin())
    found = value("talking-heads", model)
    assert list(found) == [f"model.layers.{i}.self_attn.o_proj" for i in range(2)]
    for i, row in enumerate(found.values()):
        whole, single = [], []
        for writer in whole_heads(model, i):
            U = torch.linalg.svd(writer)[0][:, :8]
            for reader in (head for later in range(i + 1, 3) for head in whole_heads(model, later)):
                whole.append(float((reader @ writer).norm() / reader.norm() / writer.norm()) * 32**0.5)
                single.append((reader @ U).norm(dim=0) / reader.norm() * 32**0.5)
        components = torch.cat(single)
        wanted = [max(whole), float(components.max())]
        wanted.append(float((components.max() - components.mean()) / components.std()))
        assert [row["composition"], row["channel"], row["outlier"]] == pytest.approx(wanted, rel=1e-4)


@torch.no_grad()
def test_what_heads_say_does_not_change_with_their_inner_basis_or_scale() -> None:
    model = tiny_decoder(blocks=2)
    before = value("talking-heads", model)["model.layers.0.self_attn.o_proj"]
    attention, M = model.model.layers[0].self_attn, gaussian(8, 8).float() + 3 * torch.eye(8)
    attention.v_proj.weight[:8] = M @ attention.v_proj.weight[:8]
    for head in (0, 1):  # which share the values
        part = slice(8 * head, 8 * head + 8)
        attention.o_proj.weight[:, part] = 5 * attention.o_proj.weight[:, part] @ torch.linalg.inv(M)
    after = value("talking-heads", model)["model.layers.0.self_attn.o_proj"]
    assert list(after.values()) == pytest.approx(list(before.values()), rel=1e-3)


def test_random_heads_say_nothing_to_each_other() -> None:
    U, R = torch.linalg.qr(gaussian(3, 256, 16))[0], gaussian(3, 16, 256, seed=1)
    assert float(scores(U, R).mean()) == pytest.approx(1, rel=0.05)


def test_one_attention_alone_talks_to_nobody() -> None:
    with pytest.raises(WeftError, match="has no two attentions whose heads weft knows"):
        value("talking-heads", tiny_decoder(blocks=1))
