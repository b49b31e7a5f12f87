"""minitron: what is cut away changes nothing where it did nothing, and the smaller model is a plain one."""

from __future__ import annotations

import copy
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM, Qwen3Config, Qwen3ForCausalLM

from weft.errors import WeftError
from weft.methods.minitron import fitting, importance
from weft.terms.units import Kept, counts_of, cut, numbers
from weft.testing_adapters import tiny_gpt2
from weft.verbs.compress import run
from weft.verbs.shrink import shrink

SIZES = {"vocab_size": 32, "hidden_size": 24, "intermediate_size": 20, "num_hidden_layers": 3, "head_dim": 4}
HEADS = {"num_attention_heads": 8, "num_key_value_heads": 4, "initializer_range": 0.2}
BATCHES = [{"input_ids": torch.randint(32, (3, 12), generator=torch.Generator().manual_seed(i))} for i in range(2)]
BLOCK = "model.layers.1."


def llama(**more: Any) -> Any:
    """Three blocks, 8 query heads and 4 KV heads of 4, with biases in attention and MLP."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = LlamaForCausalLM(LlamaConfig(**SIZES, **HEADS, attention_bias=True, mlp_bias=True, **more)).eval()
        for name, parameter in model.named_parameters():
            if name.endswith("bias") or "norm" in name:
                nn.init.normal_(parameter, std=0.3)
        return model


@torch.no_grad()
def logits(model: Any, batch: int = 0) -> Tensor:
    found: Tensor = model(**BATCHES[batch]).logits
    return found


def all_but(model: Any, **gone: Any) -> Kept:
    """The units of a model but those of the numbers named (in every block)."""
    counts = counts_of(model)
    own = {axis: torch.tensor([i for i in range(n) if i not in gone.get(axis, ())]) for axis, n in counts.items()}
    blocks = counts["blocks"]
    return Kept(own["blocks"], own["channels"], [own["heads"]] * blocks, [own["neurons"]] * blocks)


@torch.no_grad()
def silence(model: Any, axis: str, unit: int) -> None:
    """Make a unit write nothing."""
    for block in model.model.layers:
        if axis == "neurons":
            block.mlp.down_proj.weight[:, unit] = 0
        if axis == "heads":
            block.self_attn.o_proj.weight[:, unit * 8 : unit * 8 + 8] = 0
    if axis == "blocks":
        for layer in (model.model.layers[unit].mlp.down_proj, model.model.layers[unit].self_attn.o_proj):
            layer.weight.zero_()
            layer.bias.zero_()


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("axis", ["neurons", "heads", "blocks"])
def test_a_unit_that_writes_nothing_is_cut_for_nothing(axis: str, tied: bool, tmp_path: Path) -> None:
    model, unit = llama(tie_word_embeddings=tied), 1
    silence(model, axis, unit)
    before = copy.deepcopy(model.state_dict())
    small = cut(model, all_but(model, **{axis: [unit]}))
    torch.testing.assert_close(logits(small), logits(model), atol=1e-5, rtol=1e-5)
    assert counts_of(small) == counts_of(model) | {axis: counts_of(model)[axis] - 1}
    assert numbers(model, counts_of(small)) == sum(p.numel() for p in small.parameters())
    assert (small.lm_head.weight is small.model.embed_tokens.weight) == tied
    assert all(torch.equal(t, before[name]) for name, t in model.state_dict().items()), "the given model was changed"
    small.save_pretrained(tmp_path)
    assert "weft" not in (tmp_path / "config.json").read_text()
    torch.testing.assert_close(logits(AutoModelForCausalLM.from_pretrained(tmp_path)), logits(small))


def test_a_channel_that_is_nothing_is_cut_up_to_the_means_of_the_norms() -> None:
    """Channels that embeddings and layers leave at zero: the mean of squares is over fewer, which a gain and an epsilon
    of the norms make up for.
    """
    model, gone = llama(), list(range(5, 13))
    with torch.no_grad():
        model.model.embed_tokens.weight[:, gone] = 0
        for block in model.model.layers:
            for layer in (block.mlp.down_proj, block.self_attn.o_proj):
                layer.weight[gone], layer.bias[gone] = 0, 0
    small = cut(model, all_but(model, channels=gone))
    share = 16 / 24
    for name, norm in small.named_modules():
        if "norm" in name:
            norm.weight.data *= share**-0.5
            norm.variance_epsilon /= share
    torch.testing.assert_close(logits(small), logits(model), atol=1e-5, rtol=1e-5)
    found = importance(model, BATCHES)
    assert bool((found.channels[gone] == 0).all())


def test_importance_is_the_norm_over_sequences_of_means_over_their_tokens() -> None:
    """Against a loop over one sequence at a time without padding, in fp64, with the inputs caught by hand."""
    model = llama().double()
    lengths, ids = (5, 9, 12), BATCHES[0]["input_ids"]
    mask = torch.stack([(torch.arange(12) < n).long() for n in lengths])
    found = importance(model, [{"input_ids": ids, "attention_mask": mask}])
    neurons, heads = torch.zeros(20), torch.zeros(4)
    block = model.model.layers[1]
    norms = [m for name, m in model.named_modules() if name.endswith("norm")]
    per_norm = [torch.zeros(24, dtype=torch.float64) for _ in norms]
    for row, n in zip(ids, lengths, strict=True):
        seen: dict[Any, Tensor] = {}

        def output(m: nn.Module, args: Any, y: Tensor, seen: dict[Any, Tensor] = seen) -> None:
            seen[m] = y[0]

        def given(m: nn.Module, args: Any, seen: dict[Any, Tensor] = seen) -> None:
            seen[m] = args[0][0]

        handles = [m.register_forward_hook(output) for m in norms]
        handles += [m.register_forward_pre_hook(given) for m in (block.mlp.down_proj, block.self_attn.o_proj)]
        with torch.no_grad():
            model(input_ids=row[None, :n])
        for handle in handles:
            handle.remove()
        z, a = seen[block.mlp.down_proj], seen[block.self_attn.o_proj]
        neurons = neurons + (sum(t.abs() for t in z) / n) ** 2
        heads = heads + torch.tensor([sum(t[h * 8 : h * 8 + 8].norm() for t in a) / n for h in range(4)]) ** 2
        per_norm = [total + (seen[m].abs().mean(0)) ** 2 for total, m in zip(per_norm, norms, strict=True)]
    channels = sum(total.sqrt() for total in per_norm)
    for mine, theirs in (
        (found.neurons[1], neurons.sqrt()),
        (found.heads[1], heads.sqrt()),
        (found.channels, channels),
    ):
        torch.testing.assert_close(mine, theirs.double(), atol=1e-9, rtol=1e-9)
    split = importance(model, [{"input_ids": ids[i : i + 1], "attention_mask": mask[i : i + 1]} for i in range(3)])
    torch.testing.assert_close(split.channels, found.channels, atol=1e-9, rtol=1e-9)


def test_the_largest_common_share_within_the_budget_is_taken() -> None:
    model = llama()
    whole = sum(p.numel() for p in model.parameters())
    assert fitting(model, whole, ("neurons", "channels"), 4) == counts_of(model)
    counts = fitting(model, int(0.7 * whole), ("neurons", "heads"), 4)
    assert counts["neurons"] % 4 == 0 and counts["channels"] == 24 and counts["heads"] in (2, 3)
    assert numbers(model, counts) <= 0.7 * whole
    assert numbers(model, counts | {"neurons": counts["neurons"] + 4, "heads": counts["heads"] + 1}) > 0.7 * whole
    narrow = fitting(model, int(0.7 * whole), ("channels",), 4)
    assert narrow["channels"] == 16, "the next multiple of eight queries"
    with pytest.raises(WeftError, match="smallest model by heads has"):
        fitting(model, 100, ("heads",), 4)


def test_blocks_go_by_influence_or_by_loss_and_the_configuration_follows() -> None:
    model = Qwen3ForCausalLM(
        Qwen3Config(**SIZES, **HEADS, layer_types=["full_attention", "full_attention", "sliding_attention"],
                    use_sliding_window=True, sliding_window=4)
    ).eval()  # fmt: skip
    silence_all = [model.model.layers[1].mlp.down_proj, model.model.layers[1].self_attn.o_proj]
    for layer in silence_all:
        layer.weight.data.zero_()
    done = shrink(model, budget=0.8, batches=BATCHES, axes="blocks")
    assert done.kept.blocks.tolist() == [0, 2]
    assert done.model.config.layer_types == ["full_attention", "sliding_attention"]
    torch.testing.assert_close(logits(done.model), logits(model), atol=1e-5, rtol=1e-5)
    by_loss = shrink(model, budget=0.8, batches=BATCHES, axes="blocks", by="loss").kept.blocks.tolist()
    losses = []
    for i in range(3):
        small = cut(model, all_but(model, blocks=[i]))
        with torch.no_grad():
            losses.append(sum(float(small(**b, labels=b["input_ids"]).loss) for b in BATCHES))
    gone = min(range(3), key=lambda i: losses[i])
    assert by_loss == [i for i in range(3) if i != gone]


def test_a_run_writes_a_plain_model_and_what_it_kept(tmp_path: Path) -> None:
    (tmp_path / "text.txt").write_text("def add(a, b):\n    return a + b\n" * 40)
    how = {"calibration": tmp_path / "text.txt", "windows": 2, "window": 64, "multiple": 32}
    done = run("pico", tmp_path / "small", method="minitron", budget=0.6, **how)
    small = AutoModelForCausalLM.from_pretrained(tmp_path / "small")
    said = json.loads((tmp_path / "small" / "kept.json").read_text())
    assert done["share_kept"] <= 0.6 and done["parameters"] == small.num_parameters()
    assert len(said["channels"]) == small.config.hidden_size == done["channels"]
    assert done["bytes"] == 2 * done["parameters"], "written in the precision of the checkpoint"


def test_what_cannot_be_is_said(tmp_path: Path) -> None:
    with pytest.raises(WeftError, match="GPT2LMHeadModel has no self_attn.q_proj"):
        shrink(tiny_gpt2(), batches=BATCHES)
    with pytest.raises(WeftError, match="no bits to choose"):
        shrink(llama(), budget="3 bits", batches=BATCHES)
    with pytest.raises(WeftError, match="needs calibration text"):
        shrink(llama())
    with pytest.raises(WeftError, match="axis"):
        shrink(llama(), batches=BATCHES, axes="width")
    with pytest.raises(WeftError, match="leave --allocate out"):
        run("pico", tmp_path / "no", method="minitron", allocate="uniform")
    with pytest.raises(WeftError, match="makes no model of its own"):
        shrink(llama(), "loram", batches=BATCHES)
