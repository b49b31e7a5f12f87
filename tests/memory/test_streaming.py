"""Inference in pieces: the same function, in less memory."""

from __future__ import annotations

import pytest
import torch
from torch import nn
from transformers import GPT2Config, GPT2LMHeadModel, LlamaConfig, LlamaForCausalLM, Qwen3Config, Qwen3ForCausalLM

import weft
from weft.errors import WeftError
from weft.memory import SAVERS, streamed
from weft.memory.live import Live

SHAPE = {
    "vocab_size": 40, "hidden_size": 32, "intermediate_size": 96, "num_hidden_layers": 2, "num_attention_heads": 4,
    "num_key_value_heads": 2, "initializer_range": 0.2, "bos_token_id": 0, "eos_token_id": 1,
}  # fmt: skip


def made(kind: str, dtype: torch.dtype = torch.float32) -> nn.Module:
    """A small model in whose layers stands what `kind` says."""
    torch.manual_seed(0)
    model: nn.Module = LlamaForCausalLM(LlamaConfig(**SHAPE)).eval()
    if kind == "qwen3":
        model = Qwen3ForCausalLM(Qwen3Config(**SHAPE, head_dim=16)).eval()  # heads with norms, wider than the model
    elif kind == "factors":
        weft.compress(model, "svd", budget=0.7)
    elif kind == "codes and factors":
        weft.adapt(weft.quantize(model, "nf4"), "lora", rank=3)
        for name, parameter in model.named_parameters():
            if name.endswith(".B"):
                nn.init.normal_(parameter, std=0.3)
    elif kind == "biases":
        model = LlamaForCausalLM(LlamaConfig(**SHAPE, attention_bias=True, mlp_bias=True)).eval()
        for name, parameter in model.named_parameters():
            if name.endswith("bias"):
                nn.init.normal_(parameter)
        weft.compress(model, "svd", budget=0.7)
    return model.to(dtype)


KINDS = ("dense", "factors", "codes and factors", "biases", "qwen3")


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("kind", KINDS)
def test_pieces_give_what_the_whole_gives(kind: str, dtype: torch.dtype) -> None:
    model, ids = made(kind, dtype), torch.arange(3 * 11).view(3, 11) % 40
    mask = (torch.arange(11)[None] >= torch.tensor([0, 4, 7])[:, None]).long()
    ran: list[int] = []
    with torch.no_grad():
        plain = model(input_ids=ids, attention_mask=mask).logits.float()
        for rows, heads in ((1, 1), (7, 1), (256, 4)):
            model.get_submodule("model.layers.0.mlp.act_fn").register_forward_hook(lambda m, a, y: ran.append(len(y)))
            with streamed(model, rows, heads) as left:
                found = model(input_ids=ids, attention_mask=mask).logits.float()
            assert not left, left
            real = mask.bool()
            scale, close = float(plain.abs().max()), 1e-5 if dtype == torch.float32 else 4e-2
            assert (found - plain)[real].abs().max() <= close * scale
    assert {1, 7} <= set(ran)


def test_probabilities_are_those_of_all_heads() -> None:
    model, ids = made("dense"), torch.arange(33).view(3, 11)
    model.set_attn_implementation("eager")
    with torch.no_grad():
        plain = model(input_ids=ids, output_attentions=True, use_cache=False).attentions
        with streamed(model, rows=1, heads=1):
            found = model(input_ids=ids, output_attentions=True, use_cache=False).attentions
    torch.testing.assert_close(found, plain)


@pytest.mark.parametrize("part", ["mlp", "self_attn"])
def test_memory_is_that_of_the_pieces(part: str) -> None:
    torch.manual_seed(0)
    config = LlamaConfig(**{**SHAPE, "intermediate_size": 512, "num_attention_heads": 16, "head_dim": 16})
    model, tokens = LlamaForCausalLM(config).eval(), 256
    weft.compress(model, "svd", budget=0.3)
    layer = model.get_submodule(f"model.layers.0.{part}")
    x, angles = torch.randn(1, tokens, 32), torch.randn(1, tokens, 16)
    given = [x] if part == "mlp" else [x, (angles.cos(), angles.sin()), None]

    def peak() -> int:
        with Live() as live, torch.no_grad():
            before = live.count([*layer.parameters(), *layer.buffers(), x])
            layer(*given)
        return live.peak - before

    plain = peak()
    with streamed(model, rows=16, heads=1):
        pieces = peak()
    ranks = sum(p.shape[0] for name, p in layer.named_parameters() if name.endswith(".A"))
    group = 8 * 16  # one key's queries
    bound = 3 * 16 * (512 + ranks) + 2 * tokens * 32 if part == "mlp" else tokens * (2 * ranks + 6 * group + 3 * 32)
    assert pieces <= 4 * bound, f"{pieces} bytes, for {4 * bound}"
    assert pieces < 0.75 * plain


def test_training_and_generation_are_left_as_they_are() -> None:
    model, ids = made("factors"), torch.arange(9)[None]
    with streamed(model, 2, 1):
        loss = model(input_ids=ids, labels=ids).loss
        loss.backward()
        made_so = model.generate(ids[:, 2:], max_new_tokens=5, min_new_tokens=5, do_sample=False)
    gradients = {name: p.grad.clone() for name, p in model.named_parameters()}
    model.zero_grad()
    model(input_ids=ids, labels=ids).loss.backward()
    assert all(torch.equal(gradients[name], p.grad) for name, p in model.named_parameters())
    assert torch.equal(made_so, model.generate(ids[:, 2:], max_new_tokens=5, min_new_tokens=5, do_sample=False))
    assert not any("forward" in module.__dict__ for module in model.modules())


def test_what_stays_whole_is_named() -> None:
    model = GPT2LMHeadModel(GPT2Config(n_layer=1, n_embd=16, n_head=2, vocab_size=40, n_positions=16))
    with streamed(model) as left:
        assert {name.rpartition(".")[2] for name in left} == {"attn", "mlp"}
    lean = weft.lean(made("dense"))
    with streamed(lean) as left:
        assert left == {f"model.layers.{i}.mlp": "something else has replaced its forward" for i in (0, 1)}
    with pytest.raises(WeftError, match="give at least 1"), streamed(model, rows=0):
        pass
    assert SAVERS["flashsvd"].run is streamed
