"""LoRAM: what is learned on the pruned model is done by the whole one, and nothing else."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel
from torch import Tensor, nn
from transformers import LlamaConfig, LlamaForCausalLM

import weft
from weft.errors import WeftError
from weft.terms.adapters import find_adapter
from weft.testing_adapters import tiny_gpt2
from weft.verbs.loram import Kept, choose, recover

BATCHES = [{"input_ids": torch.randint(32, (4, 12), generator=torch.Generator().manual_seed(i))} for i in range(2)]
BLOCK = "model.layers.1."
HEAD, GROUPS = 4, 4


def whole() -> nn.Module:
    """Three blocks, 8 query heads and 4 KV heads of 4, with biases in the attention."""
    config = LlamaConfig(
        vocab_size=32,
        hidden_size=32,
        intermediate_size=20,
        num_hidden_layers=3,
        num_attention_heads=8,
        num_key_value_heads=GROUPS,
        attention_bias=True,
        initializer_range=0.2,
    )
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = LlamaForCausalLM(config)
        for name, parameter in model.named_parameters():
            if name.endswith("bias"):
                nn.init.normal_(parameter, std=0.1)
        return model.eval()


def chosen(ratio: float = 0.5, **options: Any) -> Kept:
    return choose(whole(), ratio, **{"first": 1, "last": 0, **options})


@torch.no_grad()
def logits(model: nn.Module) -> Tensor:
    out: Tensor = model(**BATCHES[0]).logits
    return out


def trained(kept: Kept, place: Path, make: Any = lambda model: model, method: str = "lora") -> nn.Module:
    """A pruned model with an adapter that has taken a few steps, saved."""
    model = weft.adapt(make(kept.prune(whole())), method, 2, seed=1)
    optimizer = torch.optim.AdamW(weft.parameter_groups(model, lr=1e-2))
    for _ in range(3):
        model(**BATCHES[0], labels=BATCHES[0]["input_ids"]).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    weft.save_adapter(model, place)
    return model


def test_what_is_cut() -> None:
    kept = chosen(0.5)
    small = kept.prune(whole())
    shapes = {n: tuple(small.get_submodule(BLOCK + n).weight.shape) for n in ("mlp.up_proj", "mlp.down_proj")}
    assert shapes == {"mlp.up_proj": (10, 32), "mlp.down_proj": (32, 10)}
    q, k, v, o = (small.get_submodule(f"{BLOCK}self_attn.{n}_proj") for n in "qkvo")
    assert (q.weight.shape, k.weight.shape, o.weight.shape) == ((16, 32), (8, 32), (32, 16))
    assert q.bias.shape == (16,) and o.bias.shape == (32,) and v.weight.shape == k.weight.shape
    first, same = (m.get_submodule("model.layers.0.mlp.up_proj").weight for m in (small, whole()))
    assert torch.equal(first, same), "the first block stays whole"
    heads = {row // HEAD for row in kept.rows[BLOCK + "self_attn.k_proj"]}
    assert {row // HEAD for row in kept.rows[BLOCK + "self_attn.q_proj"]} == {2 * h + i for h in heads for i in (0, 1)}
    assert kept.columns[BLOCK + "self_attn.o_proj"] == kept.rows[BLOCK + "self_attn.q_proj"]
    assert torch.isfinite(logits(small)).all()


def test_data_ranks_neurons_and_groups_by_weight_times_gradient() -> None:
    kept = chosen(0.5, batches=BATCHES)
    model = whole()
    for batch in BATCHES:
        model(**batch, labels=batch["input_ids"]).loss.backward()
    mlp, attention = model.model.layers[1].mlp, model.model.layers[1].self_attn
    worth = lambda layer: (layer.weight * layer.weight.grad).abs()  # noqa: E731
    neurons = [
        float(worth(mlp.gate_proj)[j].sum() + worth(mlp.up_proj)[j].sum() + worth(mlp.down_proj)[:, j].sum())
        for j in range(20)
    ]
    assert kept.rows[BLOCK + "mlp.up_proj"] == sorted(sorted(range(20), key=lambda j: -neurons[j])[:10])
    groups = [
        float(
            sum(worth(layer)[HEAD * h : HEAD * h + HEAD].sum() for layer in (attention.k_proj, attention.v_proj))
            + worth(attention.q_proj)[2 * HEAD * h : 2 * HEAD * (h + 1)].sum()
            + worth(attention.o_proj)[:, 2 * HEAD * h : 2 * HEAD * (h + 1)].sum()
        )
        for h in range(GROUPS)
    ]
    best = sorted(sorted(range(GROUPS), key=lambda h: -groups[h])[:2])
    assert sorted({row // HEAD for row in kept.rows[BLOCK + "self_attn.k_proj"]}) == best


def test_random_sets_depend_on_the_seed_alone() -> None:
    torch.manual_seed(1)
    one = chosen()
    torch.manual_seed(2)
    assert one == chosen() and one != chosen(seed=1)


@pytest.mark.parametrize("method", ["lora", "pissa"])
def test_the_whole_model_without_the_pruned_parts_is_the_pruned_one(method: str, tmp_path: Path) -> None:
    """With the cut columns of o and down zeroed, the whole model and the recovered adapter do what was trained."""
    kept = chosen()
    small = trained(kept, tmp_path / "small", method=method)
    assert not torch.allclose(logits(small), logits(kept.prune(whole())), atol=1e-3)
    full = whole()
    for name, columns in kept.columns.items():
        cut = torch.ones(kept.shapes[name][1], dtype=torch.bool)
        cut[columns] = False
        full.get_submodule(name).weight.data[:, cut] = 0
    weft.load_adapter(full, recover(tmp_path / "small", kept))
    torch.testing.assert_close(logits(full), logits(small), atol=1e-5, rtol=1e-5)


def test_the_update_is_the_trained_one_and_zero_elsewhere(tmp_path: Path) -> None:
    kept = chosen()
    small = trained(kept, tmp_path / "small")
    found = recover(tmp_path / "small", kept)
    count = 0
    for layer, terms in found.adapter.terms.items():
        ours, theirs = terms["recovered"], find_adapter(small).terms[layer]["default"]
        assert (ours.out_features, ours.in_features) == kept.shapes[layer]
        R, C = list(kept.rows.get(layer, range(len(ours.B)))), list(kept.columns.get(layer, range(ours.in_features)))
        # factor by factor, since a product of another shape may round its sums otherwise
        expected_B, expected_A = torch.zeros_like(ours.B), torch.zeros_like(ours.A)
        expected_B[R], expected_A[:, C] = theirs.B.detach(), theirs.A.detach()
        assert torch.equal(ours.B, expected_B) and torch.equal(ours.A, expected_A)
        count += 2 * (len(R) + len(C))
    assert weft.trainable(small).count == count


def test_the_recovered_adapter_goes_on_the_original(tmp_path: Path, recwarn: pytest.WarningsRecorder) -> None:
    kept = chosen()
    trained(kept, tmp_path / "small", lambda model: weft.quantize(model, "nf4"))  # QLoRAM
    recover(tmp_path / "small", kept).save(tmp_path / "large")
    model = weft.load_adapter(whole(), tmp_path / "large")
    assert not [w for w in recwarn if "other weights" in str(w.message)]
    theirs = PeftModel.from_pretrained(whole(), tmp_path / "large")
    torch.testing.assert_close(logits(theirs), logits(model), atol=1e-5, rtol=1e-5)
    assert not torch.allclose(logits(model), logits(whole()), atol=1e-3)


def test_keeping_everything_is_lora(tmp_path: Path) -> None:
    kept = chosen(0.0)
    assert torch.equal(logits(kept.prune(whole())), logits(whole()))
    small = trained(kept, tmp_path / "small")
    plain = weft.load_adapter(whole(), tmp_path / "small")
    assert torch.equal(logits(plain), logits(small))
    assert torch.equal(logits(weft.load_adapter(whole(), recover(tmp_path / "small", kept))), logits(small))


def test_what_was_kept_is_kept(tmp_path: Path) -> None:
    kept = chosen()
    kept.save(tmp_path / "kept.json")
    assert Kept.load(tmp_path / "kept.json") == kept
    model = whole()
    before = copy.deepcopy(model.state_dict())
    choose(model, 0.5, BATCHES, first=1, last=0)
    assert all(torch.equal(before[name], tensor) for name, tensor in model.state_dict().items())


def test_mistakes(tmp_path: Path) -> None:
    kept = chosen()
    for options, sentence in (
        ({"ratio": 1.0}, "give at least 0 and less than 1"),
        ({"first": 2, "last": 1}, "leave none of the 3 blocks"),
    ):
        with pytest.raises(WeftError, match=sentence):
            chosen(**options)
    with pytest.raises(WeftError, match="has no self_attn.q_proj in transformer.h.0"):
        choose(tiny_gpt2())
    for model in (kept.prune(whole()), weft.quantize(whole(), "nf4")):
        with pytest.raises(WeftError, match="so it cannot be pruned; give the original model"):
            kept.prune(model)
    weft.save_adapter(weft.adapt(whole(), "lora", 2), tmp_path / "whole")
    with pytest.raises(WeftError, match="where 16 rows and 32 columns were kept"):
        recover(tmp_path / "whole", kept)
    with pytest.raises(WeftError, match="does not say what was kept"):
        Kept.load(tmp_path / "missing.json")
