"""Joints of layers, and modegpt: closed forms and what the paper says of each module."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
import transformers as hf
from torch import Tensor, nn

import weft
from tests.methods.glued import glued
from weft.allocate.modegpt import shares_cut
from weft.errors import WeftError
from weft.methods import METHODS
from weft.stats.calibrate import calibrate
from weft.stats.influence import block_influence
from weft.terms import Submatrix, SumLinear
from weft.terms.joints import joints, layers_of
from weft.terms.layers import bias_of, eligible, linear_layers, weight_of
from weft.testing_adapters import task, tiny_gpt2, tiny_llama
from weft.verbs.survey import Plan, site_of

SIZES = {"vocab_size": 32, "hidden_size": 32, "num_attention_heads": 4, "initializer_range": 0.2}
QK, VO, MLP = (
    "model.layers.0.self_attn.q_proj+k_proj",
    "model.layers.0.self_attn.v_proj+o_proj",
    "model.layers.0.mlp.gate_proj+up_proj+down_proj",
)


def grouped(bias: bool = False, blocks: int = 2) -> nn.Module:
    """Four queries to two keys and values, with biases of a size that matters where there are some."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        shape = {"intermediate_size": 48, "num_hidden_layers": blocks, "num_key_value_heads": 2}
        model = hf.LlamaForCausalLM(hf.LlamaConfig(**SIZES, **shape, attention_bias=bias)).eval()
        for name, parameter in model.named_parameters():
            if name.endswith("bias"):
                nn.init.normal_(parameter)
        return model


def sites(model: nn.Module, *needs: str) -> dict[str, Any]:
    method = METHODS["modegpt"]
    found = {joint.name: joint for joint in joints(model, list(eligible(model)))}
    plan = Plan(method=method, options={}, layers=tuple(linear_layers(model)), joints=found)
    stats = calibrate(model, task(), (*method.needs, *needs))
    return {name: site_of(model, plan, name, stats, None) for name in found}


def split(site: Any, size: int) -> Any:
    from dataclasses import replace

    assert METHODS["modegpt"].split is not None
    return METHODS["modegpt"].split(replace(site, size=size, nominal=size), ridge=1e-2, steps=32)


@torch.no_grad()
def logits(model: nn.Module) -> Tensor:
    found: Tensor = model(input_ids=task()[0]["input_ids"]).logits
    return found


def test_joints_are_found_by_names_and_shapes() -> None:
    def found(model: nn.Module) -> list[str]:
        return [joint.name.removeprefix("model.layers.0.") for joint in joints(model, list(eligible(model)))]

    llama = [
        QK.removeprefix("model.layers.0."),
        VO.removeprefix("model.layers.0."),
        MLP.removeprefix("model.layers.0."),
    ]
    assert found(grouped(blocks=1)) == llama
    assert found(tiny_gpt2()) == ["transformer.h.0.mlp.c_fc+c_proj"]
    shape = {"intermediate_size": 48, "num_hidden_layers": 1, "num_key_value_heads": 4}
    qwen = hf.Qwen3ForCausalLM(hf.Qwen3Config(**SIZES, **shape, head_dim=8))
    assert found(qwen) == llama[1:], "a norm of the queries stands between"
    opt = hf.OPTForCausalLM(hf.OPTConfig(**SIZES, num_hidden_layers=1, ffn_dim=48, word_embed_proj_dim=32))
    whole = joints(opt, list(eligible(opt)))
    assert [(j.kind, j.partners) for j in whole] == [("mlp", None), ("query-key", None), ("value-output", None)]
    phi = hf.PhiForCausalLM(hf.PhiConfig(**SIZES, **shape))
    assert [j.kind for j in joints(phi, list(eligible(phi)))] == ["value-output", "mlp"], "a part of the head turns"
    gptj = hf.GPTJForCausalLM(hf.GPTJConfig(vocab_size=32, n_embd=32, n_layer=1, n_head=4, rotary_dim=4, n_inner=48))
    assert [j.kind for j in joints(gptj, list(eligible(gptj)))] == ["value-output", "mlp"]
    cohere = hf.CohereForCausalLM(hf.CohereConfig(**SIZES, **shape))
    assert joints(cohere, list(eligible(cohere)))[0].partners == (1, 0, 3, 2, 5, 4, 7, 6)
    assert layers_of(MLP)[2] == "model.layers.0.mlp.down_proj" and layers_of("lm") == ["lm"]


@pytest.mark.parametrize("method", ["modegpt", "lrp-pruning"])
def test_a_gate_and_what_it_gates_in_one_matrix_are_cut_as_two_are(method: str) -> None:
    apart = grouped().double()
    one = glued(apart)
    torch.testing.assert_close(logits(one), logits(apart))
    for model in (apart, one):
        # the last block: relevance comes to those before it through attention, which one matrix changes
        done = weft.compress(model, method, budget=0.5, layers="*.1.mlp*", batches=task()).allocation
        assert len(done.choices) == 1 and 0.45 < done.bits_per_weight / 64 < 0.5
    torch.testing.assert_close(logits(one), logits(apart), atol=1e-6, rtol=1e-6)
    weft.merge(one)
    assert {name for name, module in one.named_modules() if isinstance(module, SumLinear)} == set()
    torch.testing.assert_close(logits(one), logits(apart), atol=1e-5, rtol=1e-5)


HEADED = {**SIZES, "intermediate_size": 48, "num_hidden_layers": 1, "num_key_value_heads": 2, "head_dim": 8}
ROUTED = {"num_local_experts": 2, "num_experts": 2, "num_experts_per_tok": 1, "moe_intermediate_size": 16}
FULL = {"layer_types": ["full_attention"], "shared_expert_intermediate_size": 16}
ATTENTIONS = {
    "plain": (lambda: hf.Qwen3ForCausalLM(hf.Qwen3Config(**HEADED)), True),
    "sinks": (lambda: hf.GptOssForCausalLM(hf.GptOssConfig(**HEADED, **ROUTED)), True),
    "gate in q": (lambda: hf.Qwen3NextForCausalLM(hf.Qwen3NextConfig(**HEADED, **ROUTED, **FULL)), False),
    "gate in q, dense": (lambda: hf.Qwen3_5ForCausalLM(hf.Qwen3_5TextConfig(**HEADED, **FULL)), False),
    "gate": (lambda: hf.AfmoeForCausalLM(hf.AfmoeConfig(**HEADED, **ROUTED, num_dense_layers=1)), False),
    "mask of values": (lambda: hf.DogeForCausalLM(hf.DogeConfig(**HEADED)), False),
}


@pytest.mark.parametrize("name", ATTENTIONS)
def test_values_are_mixed_only_where_outputs_undo_it(name: str) -> None:
    """A rotation of each value head that its outputs undo: the same logits, or no joint for a method that mixes."""
    make, mixes = ATTENTIONS[name]
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = make().eval()
        turn = torch.linalg.qr(torch.randn(8, 8))[0]
        for p in (p for p in model.parameters() if p.dim() == 1):
            p.data += 0.3 * torch.randn_like(p)  # what begins at zero shows itself
    layers = list(eligible(model))
    assert METHODS["modegpt"].joints is not None and METHODS["lrp-pruning"].joints is not None
    assert any(j.kind == "value-output" for j in METHODS["lrp-pruning"].joints(model, layers)), "choosing is exact"
    assert any(j.kind == "value-output" for j in METHODS["modegpt"].joints(model, layers)) == mixes
    before = logits(model)
    v, o = (weight_of(model.get_submodule(f"model.layers.0.self_attn.{n}_proj")) for n in "vo")
    bias = bias_of(model.get_submodule("model.layers.0.self_attn.v_proj"))
    with torch.no_grad():
        for turned in (v,) if bias is None else (v, bias):
            turned.copy_((turn @ turned.view(2, 8, -1)).view_as(turned))
        o.copy_((o.view(32, 4, 8) @ turn.mT).flatten(1))
    assert torch.allclose(logits(model), before, atol=1e-4) == mixes


@pytest.mark.parametrize("bias", [False, True])
def test_values_and_outputs_are_the_best_of_their_rank(bias: bool) -> None:
    """||(O V - O' V') C^(1/2)||, of one key group with its queries' outputs under each other: the tail of singular
    values, by an SVD of the whole product.
    """
    model = grouped(bias)
    site, k, h = sites(model, "output_moment")[VO], 3, 8
    v, o = (site.members[role] for role in ("v_proj", "o_proj"))
    made = split(site, k).members
    V, O = (site.members[role].weight(torch.float64) for role in ("v_proj", "o_proj"))
    V_, O_ = (made[role].terms["submatrix"].dense(torch.float64) for role in ("v_proj", "o_proj"))
    # with the bias as a column for an input of 1
    ones, mean = torch.ones(1, 1, dtype=torch.float64), v.moments["input_mean"].view(-1, 1)
    C = torch.cat([torch.cat([v.moments["input_moment"], mean], 1), torch.cat([mean.mT, ones], 1)])
    values, vectors = torch.linalg.eigh(C)
    root = vectors * values.clamp(min=0).sqrt()
    b = torch.zeros(16) if v.bias is None else v.bias
    b_ = torch.zeros(16) if v.bias is None else made["v_proj"].bias
    V, V_ = (torch.cat([t, c.double().view(-1, 1)], 1) for t, c in ((V, b), (V_, b_)))
    for group in range(2):
        queries = [2 * group, 2 * group + 1]
        rows = slice(group * h, (group + 1) * h)

        def product(O: Tensor, V: Tensor, queries: list[int] = queries, rows: slice = rows) -> Tensor:
            return torch.cat([O[:, q * h : (q + 1) * h] @ V[rows] for q in queries]) @ root

        lost = torch.linalg.norm(product(O, V) - product(O_, V_)).item()
        tail = torch.linalg.svdvals(product(O, V))[k:].norm().item()
        assert tail > 1e-3 and lost == pytest.approx(tail, rel=1e-5)
    assert (V_.abs().sum(1) > 0).sum() == 2 * k and (O_.abs().sum(0) > 0).sum() == 4 * k
    assert o.weight().shape == (32, 32)


def test_neurons_are_read_by_least_squares() -> None:
    model = grouped()
    site = sites(model)[MLP]
    made = split(site, 20).members
    J = made["gate_proj"].terms["submatrix"].rows.long()
    assert torch.equal(J, made["up_proj"].terms["submatrix"].rows) and torch.equal(
        J, made["down_proj"].terms["submatrix"].columns
    )
    C, W = site.members["down_proj"].moments["input_moment"], site.members["down_proj"].weight(torch.float64)
    values, vectors = torch.linalg.eigh(C)
    Z = (vectors * values.clamp(min=0).sqrt()).mT  # rows whose moment is C
    fit = torch.linalg.lstsq(Z[:, J], Z @ W.mT, driver="gelsd").solution.mT
    M = made["down_proj"].terms["submatrix"].M.double()
    assert torch.linalg.norm((M - fit) @ Z[:, J].mT) < 1e-3 * torch.linalg.norm(W @ Z.mT)
    scale = 1e-2 * C.diagonal().mean()
    leverage = 1 - scale * torch.linalg.inv(C + scale * torch.eye(48, dtype=torch.float64)).diagonal()
    assert set(J.tolist()) == set(leverage.topk(20).indices.tolist())


def test_neurons_that_say_nothing_cost_nothing() -> None:
    model = grouped(blocks=1)
    mlp = model.get_submodule("model.layers.0.mlp")
    with torch.no_grad():
        mlp.get_submodule("up_proj").weight[::2] = 0
    before = logits(model)
    weft.compress(model, "modegpt", allocate={QK: None, VO: None, MLP: 24}, batches=task())
    assert torch.allclose(logits(model), before, atol=1e-3)
    assert isinstance(mlp.get_submodule("up_proj").terms["submatrix"], Submatrix)


def test_pairs_that_survive_give_the_scores_of_the_dense_model() -> None:
    """Zeroing the rows that are cut in the dense model, and nothing else, gives the same logits at every position."""
    model = grouped(bias=True)
    other = copy.deepcopy(model)
    sizes = {name: 4 if name == QK else None for name in sites(model)}
    weft.compress(model, "modegpt", allocate=sizes, batches=task())
    for name in ("q_proj", "k_proj"):
        layer = model.get_submodule(f"model.layers.0.self_attn.{name}")
        plain = other.get_submodule(f"model.layers.0.self_attn.{name}")
        assert isinstance(layer, SumLinear)
        rows = layer.terms["submatrix"].rows.long()
        heads = rows.view(-1, 4) % 8
        assert torch.equal(heads[:, :2] + 4, heads[:, 2:]), "a pair was broken"
        keep = torch.zeros(len(weight_of(plain)), 1).index_fill_(0, rows, 1)
        with torch.no_grad():
            plain.weight.mul_(keep)
            plain.bias.mul_(keep[:, 0])
    q, k = (
        model.get_submodule(f"model.layers.0.self_attn.{n}_proj").terms["submatrix"].rows.view(-1, 4) % 8 for n in "qk"
    )
    assert torch.equal(q, k.repeat_interleave(2, 0)), "queries and their key differ"
    assert torch.allclose(logits(model), logits(other), atol=1e-5)


def test_influence_is_the_turn_of_the_hidden_states() -> None:
    model = grouped()
    ids = task()[0]["input_ids"]
    with torch.no_grad():
        states = model(input_ids=ids, output_hidden_states=True).hidden_states
    found = block_influence(model, [{"input_ids": ids}])
    expected = 1 - nn.functional.cosine_similarity(states[0], states[1], dim=-1).mean().item()
    assert found["model.layers.0"] == pytest.approx(expected, rel=1e-4) and len(found) == 2


def test_shares_cut_have_their_mean_and_their_cap() -> None:
    s = [0.5, 0.1, 0.12, 0.3]
    for mean in (0.2, 0.5, 0.75):
        phi = shares_cut(s, mean, 0.1, 0.8)
        assert sum(phi) / 4 == pytest.approx(mean) and max(phi) <= 0.8 + 1e-9
        assert phi[1] >= phi[2] >= phi[3] >= phi[0]
    assert shares_cut(s, 0.3, 1e6, 0.8) == pytest.approx([0.3] * 4, rel=1e-4)


def test_what_cannot_be_cut_is_said() -> None:
    model = grouped()
    with pytest.raises(WeftError, match=r"cuts the layers model\.layers\.0\.self_attn\.q_proj\+k_proj together"):
        weft.compress(model, "modegpt", layers="*q_proj", batches=task())
    with pytest.raises(WeftError, match="no sequential form"):
        weft.compress(model, "modegpt", sequential=True, batches=task())
    with pytest.raises(WeftError, match="needs calibration text"):
        weft.compress(model, "modegpt")
    with pytest.raises(WeftError, match="offers 2, 4, 6 for it"):
        weft.compress(model, "modegpt", allocate={n: 3 for n in sites(model)}, batches=task())
    with pytest.raises(WeftError, match="followed by no other method; give it alone"):
        weft.compress(model, ["modegpt", "eora"], batches=task())
    with pytest.raises(WeftError, match="cannot be among the methods that one chooses from"):
        weft.compress(model, "auto", methods="nf,modegpt", budget="4 bits", batches=task())
    plain = nn.Module()
    plain.layers = nn.ModuleList([nn.ModuleDict({"a": nn.Linear(4, 4)})])
    with pytest.raises(WeftError, match="no layers in this Module that it could cut together"):
        weft.compress(plain, "modegpt", batches=task())
    with pytest.warns(UserWarning, match=r"leaves 2 of 4 layers as they are, such as transformer\.h\.0\.attn\.c_attn"):
        weft.compress(tiny_gpt2(), "modegpt", budget=0.7, batches=task())


def test_an_allocation_file_names_the_layers_of_each_joint_and_serves_again(tmp_path: Any) -> None:
    one, other = grouped(), grouped()
    done = weft.compress(one, "modegpt", budget=0.6, batches=task())
    assert done.allocation.spent <= done.allocation.allowed
    done.allocation.save(tmp_path / "a.json")
    weft.compress(other, "modegpt", allocate=tmp_path / "a.json", batches=task())
    assert all(torch.equal(a, b) for a, b in zip(one.state_dict().values(), other.state_dict().values(), strict=True))
    assert {layer for site in done.allocation for layer in layers_of(site)} == set(linear_layers(tiny_llama())) | {
        name.replace("layers.0", "layers.1") for name in linear_layers(tiny_llama())
    }
