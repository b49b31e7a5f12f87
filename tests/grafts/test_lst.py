"""The side network: only it has gradients and activations, its start is the backbone's, its gates do what they say."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers import LlamaConfig, LlamaForCausalLM
from transformers.cache_utils import DynamicCache

import weft
from weft.errors import WeftError
from weft.grafts.lst import GRAFT, Ladder, ladder_of
from weft.grafts.lst_start import LAYERS, fisher, stack_of
from weft.testing_adapters import tiny_gpt2

GENERATOR = torch.Generator().manual_seed(0)
IDS = torch.randint(32, (3, 10), generator=GENERATOR)
BATCHES = [{"input_ids": torch.randint(32, (2, 10), generator=GENERATOR)} for _ in range(2)]


def backbone(blocks: int = 3) -> LlamaForCausalLM:
    """4 query heads and 2 key-value heads of 8."""
    sizes = {"vocab_size": 32, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": blocks}
    heads = {"num_attention_heads": 4, "num_key_value_heads": 2, "attention_bias": True}
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = LlamaForCausalLM(LlamaConfig(**sizes, **heads, initializer_range=0.2))
        for name, parameter in model.named_parameters():
            if "norm" in name or name.endswith("bias"):
                nn.init.normal_(parameter, 1.0, 0.1)
        return model.eval()


def ladder(
    model: nn.Module, reduction: int, batches: list[dict[str, Tensor]] | None = None, seed: int = 0, **options: Any
) -> tuple[nn.Module, Ladder]:
    weft.adapt(model, "lst", batches=batches, seed=seed, reduction=reduction, **options)
    return model, ladder_of(model)


@torch.no_grad()
def logits(model: nn.Module, ids: Tensor = IDS, **inputs: Tensor) -> Tensor:
    out: Tensor = model(input_ids=ids, **inputs).logits
    return out


def test_sizes_and_counts() -> None:
    model = backbone()
    _, made = ladder(model, 4, drop=[1])
    block = stack_of(made.side)[0]
    assert block.self_attn.head_dim == 2 and tuple(block.self_attn.q_proj.weight.shape) == (8, 8)
    assert tuple(block.self_attn.k_proj.weight.shape) == (4, 8) and tuple(block.mlp.up_proj.weight.shape) == (12, 8)
    d, s, f, q, kv = 32, 8, 12, 8, 4
    per_block = s * (q + 2 * kv) + (q + 2 * kv) + q * s + s + 3 * s * f + 2 * s
    expected = 2 * per_block + s + 3 * (d * s + s) + 2 + (s * d + d)
    assert weft.trainable(model).count == expected == sum(p.numel() for p in made.parameters())
    assert GRAFT.count(backbone(), GRAFT.options({"reduction": 4, "drop": [1]})) == expected
    assert made.kept == [0, 2]


def test_the_backbone_has_no_gradient_and_keeps_nothing() -> None:
    model = backbone()
    _, made = ladder(model, 4)
    model.get_input_embeddings().requires_grad_(True)  # something trainable below must not build the graph
    saved: list[Tensor] = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(t) or t, lambda t: t):
        loss = model(input_ids=IDS, labels=IDS).loss
    weights = {p.untyped_storage().data_ptr() for p in model.parameters()}
    kept = {t.untyped_storage().data_ptr(): t for t in saved}
    activations = [t for place, t in kept.items() if place not in weights]
    wide = [t for t in activations if t.dim() and t.shape[-1] == 32 and t.is_floating_point() and not t.requires_grad]
    assert len(wide) == 4 and {t.numel() for t in wide} == {IDS.numel() * 32}, "h_0 .. h_3, for the weights of D"
    assert not [t for t in activations if t.dim() and t.shape[-1] == 48], "nothing of the backbone's MLPs"
    loss.backward()
    own = {id(p) for p in made.parameters()}
    assert all((p.grad is not None) == (id(p) in own) for p in model.parameters())


def test_learns() -> None:
    model, made = ladder(backbone(), 4, BATCHES, seed=1)
    model.train()
    optimizer = torch.optim.AdamW(made.parameters(), lr=3e-3)
    losses = []
    for _ in range(30):
        loss = model(input_ids=IDS, labels=IDS).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(float(loss.detach()))
    assert losses[-1] < losses[0] - 0.3


def test_gates() -> None:
    model, made = ladder(backbone(), 4, seed=1)
    start = logits(model)
    with torch.no_grad():
        made.gates.fill_(100.0)  # every h_i ignored
        closed = logits(model)
        for down in list(made.downs)[1:]:
            down.weight.normal_(generator=GENERATOR)
        assert torch.equal(logits(model), closed) and not torch.allclose(closed, start, atol=1e-3)
        made.gates.fill_(-100.0)  # everything before the last rung ignored
        opened = logits(model)
        made.downs[0].weight.normal_(generator=GENERATOR)
        made.downs[1].weight.normal_(generator=GENERATOR)
        torch.testing.assert_close(logits(model), opened)


def test_the_gradient_of_a_gate_is_that_of_finite_differences() -> None:
    model, made = ladder(backbone(), 4, seed=1)
    model.double()
    model(input_ids=IDS, labels=IDS).loss.backward()
    step = 0.01  # the norms of the side blocks compute in fp32
    for i in range(3):
        losses = []
        for sign in (1, -1):
            with torch.no_grad():
                made.gates[i] += sign * step
                found = model(input_ids=IDS).logits[:, :-1].flatten(0, 1)
                losses.append(float(nn.functional.cross_entropy(found, IDS[:, 1:].flatten())))
                made.gates[i] -= sign * step
        assert float(made.gates.grad[i]) == pytest.approx((losses[0] - losses[1]) / (2 * step), rel=2e-2, abs=1e-4)


def test_without_reduction_the_side_is_the_backbone() -> None:
    """r = 1, D_0 and U the identity, gates closed: the start keeps all places, so the logits are the backbone's."""
    model, made = ladder(backbone(), 1, BATCHES)
    with torch.no_grad():
        for linear in (made.downs[0], made.up):
            linear.weight.copy_(torch.eye(32))
            linear.bias.zero_()
        made.gates.fill_(100.0)
    torch.testing.assert_close(logits(model), logits(backbone()), atol=1e-5, rtol=1e-5)


def test_the_start_is_cut_out_of_the_backbone() -> None:
    model = backbone()
    importance = fisher(model, BATCHES)
    _, made = ladder(model, 4, BATCHES, drop=[0])
    residual = torch.ones(32, dtype=torch.float64)
    for layers in importance:
        for name in LAYERS:
            part = layers[name].double().sum(1 if name.endswith(("o_proj", "down_proj")) else 0)
            residual *= part / part.mean()
    places = residual.topk(8).indices.sort().values
    for thin, wide in zip(stack_of(made.side), list(stack_of(backbone()))[1:], strict=True):
        assert torch.equal(thin.input_layernorm.weight, wide.input_layernorm.weight[places])
        rows = [int((wide.mlp.up_proj.weight[:, places] == row).all(1).nonzero()) for row in thin.mlp.up_proj.weight]
        assert rows == sorted(rows)
        assert torch.equal(thin.mlp.down_proj.weight, wide.mlp.down_proj.weight[places][:, rows])
        heads = wide.self_attn.q_proj.weight[:, places]
        found = [int((heads == row).all(1).nonzero()) for row in thin.self_attn.q_proj.weight]
        assert [row // 8 for row in found] == [0, 0, 1, 1, 2, 2, 3, 3] and found[1] - found[0] == 4, "a rotated pair"
        assert {row % 8 for row in found} == {found[0] % 8, found[1] % 8}, "the same in every head"
        assert torch.equal(thin.self_attn.o_proj.weight, wide.self_attn.o_proj.weight[places][:, found])
        assert torch.equal(thin.self_attn.q_proj.bias, wide.self_attn.q_proj.bias[found])


def test_the_fisher_is_of_single_sequences() -> None:
    model = backbone()
    found = fisher(model, BATCHES)
    expected = torch.zeros(48, 32)
    for batch in BATCHES:
        for ids in batch["input_ids"]:
            model.zero_grad()
            model(input_ids=ids[None], labels=ids[None]).loss.backward()
            expected += model.model.layers[1].mlp.up_proj.weight.grad.square()
    torch.testing.assert_close(found[1]["mlp.up_proj"], expected, rtol=1e-4, atol=1e-10)


def test_on_a_quantised_backbone(tmp_path: Path) -> None:
    """The side network neither knows nor minds what its backbone is stored in; the start is chosen before."""
    model, made = ladder(backbone(), 4, BATCHES, drop=[2], seed=3)
    nn.init.normal_(made.gates, generator=GENERATOR)
    weft.save_adapter(model, tmp_path / "side")
    coded = weft.load_adapter(weft.quantize(backbone(), "nf4"), tmp_path / "side")
    assert torch.isfinite(logits(coded)).all() and not torch.equal(logits(coded), logits(model))
    before = logits(weft.quantize(backbone(), "nf4"))
    assert torch.equal(logits(weft.remove_adapter(coded)), before)
    weft.quantize(model, "nf4")
    torch.testing.assert_close(logits(model), logits(weft.load_adapter(coded, tmp_path / "side")))
    assert torch.equal(logits(weft.remove_adapter(model)), before)


def test_it_has_no_cache() -> None:
    model, _ = ladder(backbone(), 4)
    assert model(input_ids=IDS).past_key_values is None
    with pytest.raises(WeftError, match="no key-value cache: .* use_cache=False"):
        model(input_ids=IDS, use_cache=True)
    for name in ("past_key_values", "cache"):  # by version
        with pytest.raises(WeftError, match="no key-value cache"):
            model.model(input_ids=IDS, **{name: DynamicCache()})
    weft.remove_adapter(model)
    assert model(input_ids=IDS, use_cache=True).past_key_values is not None
    assert model.generation_config.use_cache == backbone().generation_config.use_cache


def test_mistakes() -> None:
    for options, sentence in (
        ({"reduction": 3}, "A reduction by 3 is not possible: hidden_size is 32"),
        ({"reduction": 8}, "head_dim is 8, its share must be whole .and even"),
        ({"reduction": 4, "drop": [0, 1, 2]}, "0 blocks are kept"),
        ({"reduction": 4, "drop": [3]}, "There is no block 3 to drop"),
    ):
        model = backbone()
        with pytest.raises(WeftError, match=sentence):
            ladder(model, **options)
        assert model.state_dict().keys() == backbone().state_dict().keys()
        assert all(p.requires_grad for p in model.parameters())
    with pytest.raises(WeftError, match="GPT2LMHeadModel cannot have a side network"):
        ladder(tiny_gpt2(), 8)
    with pytest.raises(WeftError, match="needs plain weights"):
        ladder(weft.quantize(backbone(), "nf4"), 4, BATCHES)
