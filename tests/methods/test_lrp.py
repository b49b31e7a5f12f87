"""Layer-wise relevance propagation: a walk by hand, conservation, and what is cut by it."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers import LlamaConfig, LlamaForCausalLM, OPTConfig, OPTForCausalLM

from tests.methods.glued import glued
from weft.allocate.base import Choice, LayerInfo, Shape
from weft.allocate.lrp_pruning import allocate
from weft.methods import METHODS
from weft.stats.calibrate import calibrate
from weft.stats.relevance import relevance_rules, score, unit_scores
from weft.terms.joints import joints
from weft.terms.layers import eligible, linear_layers
from weft.testing_adapters import task
from weft.verbs.compress import compress
from weft.verbs.survey import Plan, site_of

SHAPE = {"vocab_size": 32, "hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2, "head_dim": 4}


def llama() -> Any:
    """Two blocks without biases, two queries to a value head."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        config = LlamaConfig(**SHAPE, num_attention_heads=4, num_key_value_heads=2, initializer_range=0.3)
        return LlamaForCausalLM(config).eval().double()


def relevances(model: Any, batch: dict[str, Tensor]) -> dict[str, Tensor]:
    """R of the embeddings, of the inputs of every layer, and of the score."""
    seen: dict[str, Tensor] = {}

    def hook(name: str) -> Any:
        def after(module: nn.Module, args: Any, output: Tensor) -> Tensor | None:
            x = args[0]
            if name == "embedding":
                x = output.detach().requires_grad_(True)
            if x.requires_grad:
                x.register_hook(lambda grad: seen.update({name: x.detach() * grad}))
            return x if name == "embedding" else None

        return after

    handles = [layer.register_forward_hook(hook(name)) for name, layer in linear_layers(model).items()]
    handles.append(model.get_input_embeddings().register_forward_hook(hook("embedding")))
    with relevance_rules(model):
        mean, count = score(model, batch)
        (mean * count).backward()  # type: ignore[no-untyped-call]
    for handle in handles:
        handle.remove()
    return seen | {"score": (mean * count).detach()}


def test_relevance_is_kept_from_the_score_to_the_embeddings_and_the_model_gives_what_it_gave() -> None:
    model, batch = llama(), task()[0]
    with torch.no_grad():
        before = model(**batch).logits
        with relevance_rules(model):
            torch.testing.assert_close(model(**batch).logits, before)
    found = relevances(model, batch)
    total = float(found["score"])
    assert float(found["embedding"].sum()) == pytest.approx(total, rel=1e-5)
    one = "model.layers.1."
    through = {name: float(found[f"{one}{name}"].sum()) for name in ("self_attn.o_proj", "mlp.down_proj")}
    assert abs(through["mlp.down_proj"]) > 1e-3 * abs(total)
    # what reaches down comes half from gate and half from up; what reaches o is what v had
    for name, want in (("mlp.up_proj", through["mlp.down_proj"]), ("self_attn.v_proj", through["self_attn.o_proj"])):
        assert float(found[f"{one}{name}"].sum()) == pytest.approx(want, rel=1e-5)


def test_a_gate_and_what_it_gates_in_one_matrix_get_their_halves() -> None:
    apart, batch = llama(), task()[0]
    two, one = relevances(apart, batch), relevances(glued(apart), batch)
    torch.testing.assert_close(one["model.layers.1.mlp.gate_up_proj"], two["model.layers.1.mlp.up_proj"])


def test_of_a_norm_that_subtracts_the_mean_the_scale_alone_is_held(monkeypatch: pytest.MonkeyPatch) -> None:
    shape = {"vocab_size": 32, "hidden_size": 16, "word_embed_proj_dim": 16, "ffn_dim": 24, "num_attention_heads": 4}
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = OPTForCausalLM(OPTConfig(**shape, num_hidden_layers=3, init_std=0.3)).eval().double()
        for name, parameter in model.named_parameters():
            if "norm" in name:
                nn.init.normal_(parameter, mean=1)
    found, own = relevances(model, task()[0]), nn.LayerNorm.forward

    def held(self: nn.LayerNorm, x: Tensor) -> Tensor:
        c = x - x.mean(-1, keepdim=True)
        return c * (c.square().mean(-1, keepdim=True) + self.eps).rsqrt().detach() * self.weight + self.bias

    monkeypatch.setattr(nn.LayerNorm, "forward", held)
    monkeypatch.setattr("weft.stats.relevance._normed", lambda module, args, output: output)
    assert own is not nn.LayerNorm.forward
    by_hand = relevances(model, task()[0])
    for name, relevance in by_hand.items():
        torch.testing.assert_close(found[name], relevance, rtol=1e-3, atol=1e-3 * float(relevance.abs().max()))


def test_a_relu_network_by_hand() -> None:
    """R_i = sum_j x_i w_ij R_j / z_j, loop by loop, against the rules on modules."""
    draw = torch.Generator().manual_seed(0)
    W1, W2 = (torch.randn(o, i, generator=draw, dtype=torch.float64) for o, i in ((6, 5), (3, 6)))
    x = torch.randn(5, generator=draw, dtype=torch.float64)
    z1 = W1 @ x
    a = z1.clamp(min=0)
    z2 = W2 @ a
    R2 = torch.tensor([0.0, z2[1], 0.0])
    R1 = torch.tensor([sum(a[j] * W2[k, j] / z2[k] * R2[k] for k in range(3)) for j in range(6)])
    R0 = torch.tensor([sum(x[i] * W1[j, i] / z1[j] * R1[j] for j in range(6)) for i in range(5)])
    net = nn.Sequential(nn.Linear(5, 6, bias=False), nn.ReLU(), nn.Linear(6, 3, bias=False)).double()
    net[0].weight.data, net[2].weight.data = W1, W2
    given = x.clone().requires_grad_(True)
    with relevance_rules(net):
        net(given)[1].backward()
    assert given.grad is not None
    torch.testing.assert_close(x * given.grad, R0.double(), atol=1e-6, rtol=1e-5)
    plain = x.clone().requires_grad_(True)
    net(plain)[1].backward()
    torch.testing.assert_close(x * plain.grad, R0.double(), atol=1e-6, rtol=1e-5)  # type: ignore[operator]


def test_statistics_are_sums_over_the_tokens_that_count_beside_those_of_the_loss() -> None:
    model = llama()
    batch = dict(task()[0])
    batch["attention_mask"] = batch["attention_mask"].clone()
    batch["attention_mask"][:, 12:] = 0
    batch["labels"] = batch["input_ids"].masked_fill(batch["attention_mask"] == 0, -100)
    name = "model.layers.0.mlp.down_proj"
    found = calibrate(model, [batch], ("input_relevance", "mean_grad"), layers=name)[name]
    mine = relevances(copy.deepcopy(model), batch)[name][:, :12].abs().sum((0, 1)) / (4 * 12)
    torch.testing.assert_close(found["input_relevance"], mine, atol=1e-5, rtol=1e-4)
    alone = calibrate(model, [batch], ("mean_grad",), layers=name)[name]["mean_grad"]
    torch.testing.assert_close(found["mean_grad"], alone)
    scaled = copy.deepcopy(model)
    scaled.lm_head.weight.data *= 3
    again = calibrate(scaled, [batch], ("input_relevance",), layers=name)[name]["input_relevance"]
    torch.testing.assert_close(again, 3 * found["input_relevance"], atol=1e-5, rtol=1e-4)


@torch.no_grad()
def test_units_that_write_nothing_have_no_relevance_and_go_first_for_nothing() -> None:
    model = llama().float()
    gone, head = [1, 4, 7, 8, 20, 22], [0, 3]
    for block in model.model.layers:
        block.mlp.down_proj.weight[:, gone] = 0
        block.self_attn.o_proj.weight[:, [q * 4 + i for q in range(4) for i in head]] = 0
    before = model(**task()[0]).logits
    done = compress(model, "lrp-pruning", budget=0.8, steps=4, batches=task())
    joined = {name: size for name, size in done.allocation.items() if "+" in name}
    assert len(joined) == 4 and set(joined.values()) == {18, 2}
    torch.testing.assert_close(model(**task()[0]).logits, before, atol=1e-4, rtol=1e-4)


def test_scores_sum_to_one_and_all_layers_are_in_one_ranking() -> None:
    model = llama()
    for joint in (j for j in joints(model, list(eligible(model))) if j.kind != "query-key"):
        reader = list(joint.members.values())[-1]
        scores = unit_scores(joint, torch.rand(reader.copies * joint.width).double())
        assert float(scores.sum()) == pytest.approx(1) and scores.shape[1] == joint.width
    shape = Shape(4, 4, 1)
    infos = {n: LayerInfo(shape, [*(Choice(k, 4 * k) for k in (1, 2, 3)), Choice(None, 16)]) for n in "ab"}
    relevance = {"a": torch.tensor([[0.6, 0.3, 0.06, 0.04]]), "b": torch.tensor([[0.28, 0.26, 0.24, 0.22]])}
    chosen = allocate(infos, 20, relevance=relevance)
    assert (chosen["a"].size, chosen["b"].size) == (2, 3), "0.6 0.3 | 0.28 0.26 0.24"
    assert allocate(infos, 8, relevance=relevance)["b"].size == 1, "each keeps its smallest"


def test_the_effect_is_what_is_left_out() -> None:
    model, method = llama(), METHODS["lrp-pruning"]
    found = {joint.name: joint for joint in method.joints(model, list(eligible(model)))}  # type: ignore[misc]
    plan = Plan(method=method, options={}, layers=tuple(linear_layers(model)), joints=found)
    name = next(name for name in found if "mlp" in name)
    site = site_of(model, plan, name, calibrate(model, task(), method.needs), 6)
    assert method.split is not None
    split = method.split(site, steps=4)
    scores = site.members["down_proj"].moments["input_relevance"]
    kept = scores.topk(6).indices.sort().values
    assert split.members["down_proj"].terms["submatrix"].columns.tolist() == kept.tolist()
    assert split.members["up_proj"].terms["submatrix"].rows.tolist() == kept.tolist()
