"""Calibration against explicit loops over tokens and sequences."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers as hf
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

import weft
from tests.stats.models import BUILD, COMMON, GROUPED, batches, build, ids, reference
from weft.errors import WeftError
from weft.stats import cache, collect
from weft.stats import groups as stats_groups
from weft.stats.calibrate import calibrate, layers_by_block
from weft.stats.collect import Collector, check_needs
from weft.stats.groups import groups_that_fit, moment_bytes
from weft.terms.layers import block_stacks, linear_layers

NEEDS = tuple(need for need in collect.NEEDS if need != "input_relevance")
"""Those of one pass; relevance has its own, in tests/methods/test_lrp.py."""


@pytest.mark.parametrize("name", [name for name in BUILD if name != "gemma3"])
def test_every_statistic_equals_the_explicit_loop(name: str) -> None:
    model, data = build(name), batches(name)
    expected, found = reference(name, model, data), calibrate(model, data, NEEDS)
    assert found.keys() == expected.keys()
    for layer in found:
        assert tuple(found[layer]) == NEEDS
        for need in NEEDS:
            assert found[layer][need].dtype == (torch.float32 if need == "mean_grad" else torch.float64)
            scale = expected[layer][need].abs().max().item()
            torch.testing.assert_close(
                found[layer][need].double(),
                expected[layer][need],
                rtol=1e-3,
                atol=1e-5 * scale,
                msg=lambda m, at=(layer, need): f"{at}: {m}",
            )


def test_labels_default_to_the_tokens_that_the_mask_keeps() -> None:
    model, data = build("llama"), batches("llama")
    bare = [{key: batch[key] for key in ("input_ids", "attention_mask")} for batch in data]
    with_labels = calibrate(model, data, ["output_grad_moment"])
    for layer, moments in calibrate(model, bare, ["output_grad_moment"]).items():
        assert torch.equal(moments["output_grad_moment"], with_labels[layer]["output_grad_moment"])


def test_fisher_is_of_sequences_not_of_the_batch() -> None:
    model, data = build("llama"), batches("llama")
    layer = "model.layers.0.mlp.up_proj"
    fisher = calibrate(model, data[:1], ["fisher_rows"])[layer]["fisher_rows"]
    loss = model(**data[0]).loss * int((data[0]["labels"][:, 1:] != -100).sum())
    batch_gradient = torch.autograd.grad(loss, model.get_submodule(layer).weight)[0]
    squared = batch_gradient.double().square().sum(1) / 2
    assert not torch.allclose(fisher, squared, rtol=0.05)


def test_layers_fed_one_tensor_share_one_statistic() -> None:
    model, data = build("llama"), batches("llama")
    found = calibrate(model, data, ["input_moment"])
    shared = {name: moments["input_moment"].data_ptr() for name, moments in found.items()}
    block = [name for name in shared if ".0." in name]
    groups = {pointer: [n.rsplit(".", 1)[1] for n in block if shared[n] == pointer] for pointer in shared.values()}
    assert sorted(map(tuple, filter(None, groups.values()))) == [
        ("down_proj",), ("gate_proj", "up_proj"), ("o_proj",), ("q_proj", "k_proj", "v_proj"),
    ]  # fmt: skip


def test_chosen_layers_only() -> None:
    model, data = build("llama"), batches("llama")
    found = calibrate(model, data, ["input_mean"], layers="*v_proj")
    assert list(found) == ["model.layers.0.self_attn.v_proj", "model.layers.1.self_attn.v_proj"]
    whole = calibrate(model, data, ["input_mean"])
    for name, moments in found.items():
        assert torch.equal(moments["input_mean"], whole[name]["input_mean"])


def test_no_needs_no_work() -> None:
    assert calibrate(build("llama"), batches("llama"), [])["model.layers.0.mlp.up_proj"] == {}


def test_half_precision_moments_do_not_overflow() -> None:
    """fp16 activations of 3000 overflow when squared in fp16."""
    model = build("llama").half()
    with torch.no_grad():
        for block in model.model.layers:
            block.input_layernorm.weight.fill_(3000.0)
    found = calibrate(model, [{"input_ids": ids(2, 8)}], ["input_moment"])["model.layers.0.self_attn.q_proj"]
    assert torch.isfinite(found["input_moment"]).all() and found["input_moment"].max() > 1e6


def test_a_mean_that_dwarfs_the_spread_leaves_a_covariance() -> None:
    model = nn.Sequential(nn.Linear(8, 8))
    x = 3000 + torch.randn(500, 8, generator=torch.Generator().manual_seed(0))
    collector = Collector({"0": model[0]}, ["input_moment", "input_mean"])
    with collector, torch.no_grad():
        collector.begin({"x": x})
        model(x)
    moments = collector.moments()["0"]
    covariance = moments["input_moment"] - moments["input_mean"].outer(moments["input_mean"])
    torch.testing.assert_close(covariance, torch.cov(x.double().mT, correction=0), rtol=1e-6, atol=1e-6)


def test_flattened_tokens_keep_their_sequences() -> None:
    """A layer that is fed (batch * positions, features), as some models do, has the same statistics."""

    class Flat(nn.Module):
        def __init__(self, flat: bool) -> None:
            super().__init__()
            torch.manual_seed(0)
            self.flat, self.layer = flat, nn.Linear(4, 3)

        def forward(self, x: Tensor) -> Tensor:
            return self.layer(x.flatten(0, 1)).unflatten(0, x.shape[:2]) if self.flat else self.layer(x)

    x = torch.randn(2, 5, 4, generator=torch.Generator().manual_seed(1))
    batch = {"x": x, "attention_mask": torch.tensor([[1, 1, 1, 0, 0], [0, 1, 1, 1, 1]])}
    found = []
    for flat in (False, True):
        model = Flat(flat)
        collector = Collector({"layer": model.layer}, NEEDS)
        with collector:
            collector.begin(batch)
            (model(x.requires_grad_()) * batch["attention_mask"].unsqueeze(-1)).square().sum().backward()
        found.append(collector.moments()["layer"])
    for need in NEEDS:
        torch.testing.assert_close(found[0][need], found[1][need])


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("fails", [True, False])
def test_the_model_is_left_as_it_was(training: bool, fails: bool) -> None:
    model, data = build("llama").train(training), batches("llama")
    model.model.layers[0].eval()
    model.model.embed_tokens.weight.requires_grad_(False)
    grad = torch.ones_like(model.model.norm.weight)
    model.model.norm.weight.grad = grad.clone()
    before = _state(model)
    if fails:
        data[1]["input_ids"][0, 0] = 1000  # beyond the vocabulary
        with pytest.raises(IndexError):
            calibrate(model, data, NEEDS)
    else:
        calibrate(model, data, NEEDS)
    assert _state(model) == before
    assert torch.equal(model.model.norm.weight.grad, grad)


def _state(model: nn.Module) -> list[Any]:
    return [
        [module.training for module in model.modules()],
        [(p.requires_grad, p.grad is None, p._version) for p in model.parameters()],
        [(len(m._forward_hooks), len(m._forward_pre_hooks), len(m._backward_hooks)) for m in model.modules()],
    ]


class Counted:
    """A progress bar that counts the batches taken."""

    taken = 0

    def __call__(self, items: Any, what: str) -> Any:
        for item in items:
            self.taken += 1
            yield item


def test_nan_is_reported_after_the_first_batch_and_names_the_layer() -> None:
    model, seen = build("llama"), Counted()
    with torch.no_grad():
        model.model.layers[1].mlp.up_proj.weight[0, 0] = float("nan")
    message = "The statistic input_moment of layer model.layers.1.mlp.down_proj holds NaN or infinity; run the model"
    with pytest.raises(WeftError, match=message):
        calibrate(model, batches("llama"), ["input_moment"], track=seen)
    assert seen.taken == 1


def test_a_dead_layer_is_reported_after_the_first_batch_and_named() -> None:
    model, seen = build("llama"), Counted()
    with torch.no_grad():
        model.model.layers[1].mlp.up_proj.weight.zero_()
    message = "The statistic input_moment of layer model.layers.1.mlp.down_proj is zero everywhere"
    with pytest.raises(WeftError, match=message):
        calibrate(model, batches("llama"), ["input_moment"], track=seen)
    assert seen.taken == 1


class Forked(nn.Module):
    """One layer is applied to every batch, one to the second alone, one never, and one without touching the loss."""

    def __init__(self) -> None:
        super().__init__()
        self.always, self.later, self.never, self.aside = (nn.Linear(4, 4) for _ in range(4))
        self.calls = 0

    def forward(self, x: Tensor) -> Tensor:
        self.calls += 1
        y = self.always(x)
        self.aside(x)
        return self.later(y) if self.calls > 1 else y


def test_a_layer_may_come_later_but_not_never() -> None:
    model = Forked()
    collector = Collector(dict(model.named_children()), ["output_grad_moment"])
    with collector:
        for _ in range(2):
            collector.begin({"x": torch.ones(1, 2, 4)})
            model(torch.ones(1, 2, 4, requires_grad=True)).sum().backward()
            collector.check(complete=False)
    with pytest.raises(WeftError, match="The layer never was not reached on the calibration batches; leave it out"):
        collector.moments()
    del collector.layers["never"]
    with pytest.raises(WeftError, match="The layer aside does not touch the loss on the calibration batches"):
        collector.moments()


def test_mistakes_are_sentences() -> None:
    model, data = build("llama"), batches("llama")
    with pytest.raises(WeftError, match="at least one batch"):
        calibrate(model, [], ["input_moment"])
    with pytest.raises(WeftError, match="no statistic called 'input_momnt'; the nearest are: input_moment"):
        calibrate(model, data, ["input_momnt"])
    with pytest.raises(WeftError, match="matches no linear layer; the nearest names are: "):
        calibrate(model, data, ["input_moment"], layers="*mpl*")
    with pytest.raises(WeftError, match="every label of it is -100"):
        calibrate(model, [{**data[0], "labels": torch.full_like(data[0]["labels"], -100)}], ["output_grad_moment"])
    with pytest.raises(WeftError, match="BertForMaskedLM is not a causal language model: its calibration batches need"):
        calibrate(build("bert"), [{"input_ids": ids(1, 4)}], ["output_grad_moment"])


def test_needs_come_without_repeats_in_the_order_of_the_table() -> None:
    assert check_needs(["input_mean", "input_moment", "input_mean"]) == ("input_moment", "input_mean")


def test_layers_by_block() -> None:
    llama = build("llama")
    chunks = layers_by_block(llama, linear_layers(llama))
    assert [len(chunk) for chunk in chunks] == [7, 7]
    t5 = build("t5")
    assert [len(chunk) for chunk in layers_by_block(t5, linear_layers(t5))] == [6, 6, 10, 10]
    bert = hf.BertForSequenceClassification(hf.BertConfig(**COMMON))
    chunks = layers_by_block(bert, linear_layers(bert))
    assert chunks[-1] == ["bert.pooler.dense"] and [len(chunk) for chunk in chunks] == [6, 6, 1]


def files(directory: Path) -> list[Path]:
    return sorted(directory.iterdir())


def test_cache_is_hit_by_the_same_question(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model, data = build("llama"), batches("llama")
    first = calibrate(model, data, NEEDS, cache=tmp_path)
    assert [file.suffix for file in files(tmp_path)] == [".safetensors"]
    monkeypatch.setattr(hf.LlamaForCausalLM, "forward", None)  # nothing is run again
    again = calibrate(model, data, NEEDS, cache=tmp_path)
    for layer in first:
        for need in NEEDS:
            assert torch.equal(first[layer][need], again[layer][need])


def test_cache_is_missed_by_anything_else(tmp_path: Path) -> None:
    data = batches("llama")

    def key(change: Any = None, data: Any = data, needs: Any = ("input_mean",), layers: Any = None) -> str:
        model = build("llama")
        if change is not None:
            with torch.no_grad():
                change(model)
        return cache.fingerprint(model, data, needs, linear_layers(model, layers))

    def swap_rows(model: nn.Module) -> None:  # the sum and the squares stay
        weight = model.model.layers[0].mlp.up_proj.weight
        weight.copy_(weight.flip(0))

    flat = {name: tensor.view(1, -1) for name, tensor in data[0].items()}
    keys = [
        key(),
        key(swap_rows),
        key(lambda m: m.model.layers[0].mlp.up_proj.weight[0, 0].add_(1e-3)),
        key(lambda m: m.model.layers[0].mlp.up_proj.weight.neg_()),
        key(lambda m: m.bfloat16()),
        key(lambda m: setattr(m.config, "rms_norm_eps", 1e-2)),
        key(data=data[:1]),
        key(data=[data[1], data[0]]),
        key(data=[flat, data[1]]),
        key(data=[{**data[0], "labels": data[0]["labels"].masked_fill(data[0]["labels"] == 5, -100)[:, :]}, data[1]])
        if (data[0]["labels"] == 5).any()
        else "labels",
        key(needs=("input_moment",)),
        key(layers="*v_proj"),
    ]
    assert len(set(keys)) == len(keys)
    assert key() == keys[0]


def test_a_key_is_made_a_chunk_at_a_time(monkeypatch: pytest.MonkeyPatch) -> None:
    model, made = build("llama"), list[Tensor]()

    class Watch(TorchDispatchMode):
        def __torch_dispatch__(self, call: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            found = call(*args, **(kwargs or {}))
            made.extend(t for t in tree_leaves(found) if isinstance(t, Tensor))
            return found

    monkeypatch.setattr("weft.digests.CHUNK", 64)
    own = {tensor.untyped_storage().data_ptr() for tensor in model.state_dict().values()}
    with Watch():
        cache.fingerprint(model, (), (), [])
    assert 0 < max(t.numel() for t in made if t.untyped_storage().data_ptr() not in own) <= 64


def test_an_interrupted_pass_resumes_to_the_same_bits(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model, data = build("llama"), batches("llama") * 2
    whole = calibrate(model, data, NEEDS)
    monkeypatch.setattr(cache, "_SECONDS", 0.0)

    def interrupted(items: Any, what: str) -> Any:
        for i, item in enumerate(items):
            if i == 3:
                raise KeyboardInterrupt
            yield item

    with pytest.raises(KeyboardInterrupt):
        calibrate(model, data, NEEDS, cache=tmp_path, track=interrupted)
    seen = Counted()
    resumed = calibrate(model, data, NEEDS, cache=tmp_path, track=seen)
    assert seen.taken == 1
    for layer in whole:
        for need in NEEDS:
            assert torch.equal(whole[layer][need], resumed[layer][need])


def test_a_damaged_snapshot_counts_as_none(tmp_path: Path) -> None:
    model, data = build("llama"), batches("llama")
    whole = calibrate(model, data, ["input_moment"], cache=tmp_path)
    (file,) = files(tmp_path)
    file.write_bytes(file.read_bytes()[:-100])
    again = calibrate(model, data, ["input_moment"], cache=tmp_path)
    for layer in whole:
        assert torch.equal(whole[layer]["input_moment"], again[layer]["input_moment"])


def test_pictures_in_half_precision_have_a_key() -> None:
    model = build("vit").bfloat16()
    data = [{key: t.bfloat16() if t.is_floating_point() else t for key, t in b.items()} for b in batches("vit")]
    assert re.fullmatch("[0-9a-f]{24}", cache.fingerprint(model, data, ["input_mean"], linear_layers(model)))


def test_nbytes_counts_what_is_held() -> None:
    model = hf.LlamaForCausalLM(hf.LlamaConfig(**GROUPED))
    layers = linear_layers(model, "model.layers.0.*")
    collector = Collector(layers, ["input_moment"])
    with collector, torch.no_grad():
        batch = {"input_ids": ids(1, 4)}
        collector.begin(batch)
        model(**batch)
    assert collector.nbytes == 8 * (3 * 16 * 16 + 24 * 24)  # q k v; o; gate up; down


# ---- a bounded memory


def test_a_backward_pass_is_of_few_tokens() -> None:
    """Sequences of a batch are taken apart; where one has nothing to predict, the batch stays whole."""
    model, whole, seen = build("llama"), ids(4, 300) % COMMON["vocab_size"], []
    model.register_forward_pre_hook(lambda *call: seen.append(call[2]["input_ids"].shape[0]), with_kwargs=True)
    layers = "model.layers.0.*"
    found = calibrate(model, [{"input_ids": whole}], ["output_grad_moment"], layers=layers)
    assert seen == [1, 1, 1, 1]
    labels = whole.clone()
    labels[2] = -100
    calibrate(model, [{"input_ids": whole, "labels": labels}], ["output_grad_moment"], layers=layers)
    assert seen[4:] == [4]
    mask = torch.ones_like(whole)
    mask[2, 1:] = 0
    calibrate(model, [{"input_ids": whole, "attention_mask": mask}], ["output_grad_moment"], layers=layers)
    assert seen[5:] == [4]
    again = calibrate(model, [{"input_ids": row[None]} for row in whole], ["output_grad_moment"], layers=layers)
    for name, moments in found.items():
        torch.testing.assert_close(moments["output_grad_moment"], again[name]["output_grad_moment"])


def test_groups_are_runs_of_blocks_that_fit() -> None:
    model = build("llama")
    layers = list(linear_layers(model))
    blocks = layers_by_block(model, layers)
    need = ("input_moment", "mean_grad")
    taken = [moment_bytes(model, names, need) for names in blocks]
    stats = calibrate(model, batches("llama"), need)
    assert sum(taken) >= sum({t.data_ptr(): t.nbytes for m in stats.values() for t in m.values()}.values())
    assert groups_that_fit(model, layers, need, sum(taken)) == [[n for names in blocks for n in names]]
    assert groups_that_fit(model, layers, need, 0) == blocks
    for group in groups_that_fit(model, layers, need, max(taken) + min(taken)):
        assert len(group) == max(map(len, blocks)) or moment_bytes(model, group, need) <= max(taken) + min(taken)


@pytest.mark.parametrize("method", ["lora-ga", "eva", "ce-ssl"])
def test_adapters_start_from_statistics_of_some_blocks_at_a_time(method: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """With the same numbers, and never more in memory than one group's."""
    models = {share: build("llama") for share in (100.0, 0.0)}
    blocks = layers_by_block(models[0.0], linear_layers(models[0.0]))
    held: list[int] = []

    def counted(*args: Any, layers: list[str], **settings: Any) -> Any:
        held.append(len(layers))
        return calibrate(*args, layers=layers, **settings)

    monkeypatch.setattr(stats_groups, "calibrate", counted)
    for share, model in models.items():
        monkeypatch.setattr(stats_groups, "SHARE", share)
        held.clear()
        weft.adapt(model, method, 2, batches=batches("llama"))
        assert max(held) == (sum(map(len, blocks)) if share else max(map(len, blocks)))
    for (name, a), b in zip(models[0.0].state_dict().items(), models[100.0].state_dict().values(), strict=True):
        torch.testing.assert_close(a, b, msg=name)


@pytest.mark.parametrize("name", ["llama", "gemma2"])
def test_gradients_come_without_the_logits(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    model, data = build(name), batches(name)
    tokens = max(batch["input_ids"].numel() for batch in data)
    whole = calibrate(model, data, ["output_grad_moment"])
    monkeypatch.setattr("weft.memory.logits.CHUNK_LOGITS", 4 * COMMON["vocab_size"])
    widest: list[int] = []

    class Sizes(TorchDispatchMode):
        def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            out = func(*args, **(kwargs or {}))
            widest.extend(t.numel() for t in tree_leaves(out) if isinstance(t, Tensor) and t.shape[-1:] == (64,))
            return out

    with Sizes():
        chunked = calibrate(model, data, ["output_grad_moment"])
    assert "forward" not in model.__dict__ and model(**data[0]).logits is not None
    assert 0 < max(widest) < (tokens - len(data[0]["input_ids"])) * COMMON["vocab_size"]
    for layer, moments in chunked.items():
        expected = whole[layer]["output_grad_moment"]
        torch.testing.assert_close(
            moments["output_grad_moment"], expected, rtol=1e-4, atol=1e-6 * float(expected.abs().max())
        )


def test_a_pass_for_inputs_makes_no_logits_but_of_the_last_token(monkeypatch: pytest.MonkeyPatch) -> None:
    model, data = build("llama"), batches("llama")
    rows: list[int] = []
    head, needs = model.get_output_embeddings(), [NEEDS[0]]

    def forward(x: Tensor) -> Tensor:
        rows.append(x.shape[-2])
        return torch.nn.functional.linear(x, head.weight)

    monkeypatch.setattr(head, "forward", forward, raising=False)
    plain = calibrate(model, data, needs)
    assert rows == [1] * len(data)
    head.register_forward_hook(lambda module, args, output: None)  # somebody watches it: all of them
    watched = calibrate(model, data, needs)
    assert rows[len(data) :] == [batch["input_ids"].shape[1] for batch in data]
    assert all(torch.equal(plain[name][needs[0]], watched[name][needs[0]]) for name in plain)


@pytest.mark.parametrize("name", BUILD)
def test_gradients_in_later_blocks_are_those_of_all_and_keep_nothing_of_earlier_ones(name: str) -> None:
    model, data = build(name), batches(name)
    needs = ("input_moment", "output_grad_moment", "mean_grad", "fisher_rows")
    stacks, whole = block_stacks(model), calibrate(model, data, needs)
    path, stack = list(stacks.items())[-1]
    layers, kept = [layer for layer in whole if layer.startswith(f"{path}.{len(stack) - 1}.")], list[bool]()

    def watch(module: nn.Module, args: Any, output: Any) -> None:
        kept.append((output[0] if isinstance(output, tuple) else output).requires_grad)

    handle = stack[0].register_forward_hook(watch)
    part = calibrate(model, data, needs, layers=layers)
    handle.remove()
    assert list(part) == layers
    for layer, moments in part.items():
        for need, value in moments.items():
            scale = whole[layer][need].abs().max().item()
            torch.testing.assert_close(value, whole[layer][need], rtol=1e-5, atol=1e-6 * scale)
    one = len(stacks) == 1 and len(stack) > 1
    assert any(kept) != one, "the blocks before keep nothing for a backward pass, unless something leads around them"
