"""The lean step has the plain step's gradients, for every family, and leaves no trace when it is switched off."""

from __future__ import annotations

import copy
import gc
import inspect
import pickle
import weakref

import pytest
import torch
from torch import nn

from weft.memory import lean, lean_report, measure, unlean
from weft.terms import SumLinear


def saved_bytes(model, batch):
    """Bytes of what autograd holds after the forward pass, parameters and buffers aside."""
    return measure.saved_bytes(lambda: model(**batch), [*model.parameters(), *model.buffers()])


def test_saved_bytes_are_those_of_the_formula_and_let_go():
    x, W = torch.randn(8, 16, requires_grad=True), torch.randn(4, 16, requires_grad=True)
    h = []

    def forward():
        h.append(x.relu())
        return (h[-1] @ W.T).exp().sum()

    assert measure.saved_bytes(forward, [x, W]) == 4 * (8 * 16 + 8 * 4)  # relu's and exp's outputs
    output = weakref.ref(h.pop())
    gc.collect()
    assert output() is None and not any(type(o) is measure._Held for o in gc.get_objects())


@pytest.mark.parametrize("adapted", [False, True], ids=["full", "adapted"])
def test_gradients_are_the_plain_ones_in_fp64(models, family, adapted):
    check_gradients(models, models.make_model(family).double(), adapted, 1e-10)


@pytest.mark.parametrize("adapted", [False, True], ids=["full", "adapted"])
def test_gradients_are_the_plain_ones_in_fp32(models, adapted):
    check_gradients(models, models.make_model("gemma2"), adapted, 1e-5)


def check_gradients(models, model, adapted, tolerance):
    model = models.put_on(model) if adapted else model
    plain, expected = models.train_step(model)
    output, grads = models.train_step(lean(model))
    torch.testing.assert_close(output.loss, plain.loss, rtol=1e-6, atol=1e-6)
    models.assert_same(grads, expected, tolerance)
    assert output.logits is None and plain.logits is not None


def test_every_kind_of_module_is_taken(models):
    counts = lean_report(lean(models.put_on(models.make_model("llama")))).lean
    assert counts == {"causal_lm": 1, "sum_linear": 14, "gated_mlp": 2, "elementwise": 7}
    assert lean_report(lean(models.make_model("phi3"))).lean["fused_gated_mlp"] == 2


def test_num_items_in_batch(models):
    model = models.put_on(models.make_model("llama"))
    plain, expected = models.train_step(model, num_items_in_batch=torch.tensor(40))
    output, grads = models.train_step(lean(model), num_items_in_batch=torch.tensor(40))
    torch.testing.assert_close(output.loss, plain.loss)
    models.assert_same(grads, expected, 1e-5)


@pytest.mark.parametrize("reentrant", [False, True])
def test_gradient_checkpointing(models, reentrant):
    model = models.put_on(models.make_model("llama"))
    model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": reentrant})
    model.enable_input_require_grads()
    _, expected = models.train_step(model)
    plain = saved_bytes(model, models.make_batch())
    _, grads = models.train_step(lean(model))
    models.assert_same(grads, expected, 1e-5)
    assert saved_bytes(model, models.make_batch()) <= plain


@pytest.mark.parametrize("adapted", [False, True], ids=["full", "adapted"])
def test_autocast(models, adapted):
    model = models.make_model("llama")
    model = models.put_on(model) if adapted else model
    with torch.autocast("cpu", dtype=torch.bfloat16):
        plain, expected = models.train_step(model)
        output, grads = models.train_step(lean(model))
    torch.testing.assert_close(output.loss, plain.loss, rtol=1e-2, atol=1e-2)
    for name in expected:  # bf16 keeps 8 bits
        assert (grads[name] - expected[name]).norm() <= 0.02 * expected[name].norm(), name


def test_bf16_forward_is_bit_equal_in_the_norms_and_mlp(models):
    model = models.make_model("gemma").bfloat16()
    x = torch.randn(2, 5, 16, generator=torch.Generator().manual_seed(0)).bfloat16().requires_grad_()
    block = model.model.layers[0]
    parts = [block.input_layernorm, block.mlp]
    expected = [part(x) for part in parts]
    lean(model)
    for part, y in zip(parts, expected, strict=True):
        assert torch.equal(part(x), y)


def test_compiled_step_without_a_graph_break(models):
    model = lean(models.put_on(models.make_model("llama", num_hidden_layers=1)))
    _, expected = models.train_step(model)
    model.zero_grad()
    compiled = torch.compile(model, backend="aot_eager", fullgraph=True)
    output = compiled(**models.make_batch())
    output.loss.backward()
    grads = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
    models.assert_same(grads, expected, 1e-5)


def test_deepcopy_and_pickle_are_lean_and_independent(models):
    model = lean(models.put_on(models.make_model("qwen3")))
    _, expected = models.train_step(model)
    for other in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert other.forward.module is other
        assert lean_report(other) == lean_report(model)
        model.zero_grad()
        _, grads = models.train_step(other)
        models.assert_same(grads, expected, 1e-5)
        assert all(p.grad is None for p in model.parameters())  # the copy ran its own modules, not the original's


def test_switching_off_leaves_no_trace(models):
    model = models.put_on(models.make_model("llama"))
    before = [dict(module.__dict__) for module in model.modules()]
    assert lean(lean(model)) is model
    assert any(module.__dict__.keys() != old.keys() for module, old in zip(model.modules(), before, strict=True))
    assert lean(model, on=False) is model
    assert [module.__dict__.keys() for module in model.modules()] == [old.keys() for old in before]
    assert unlean(model).forward.__func__ is type(model).forward


def test_evaluation_and_calls_without_labels_return_logits(models):
    model = models.make_model("llama")
    batch = models.make_batch()
    expected = model(**batch)
    lean(model)
    assert torch.equal(model(input_ids=batch["input_ids"]).logits, expected.logits)
    output = model.eval()(**batch)
    assert torch.equal(output.logits, expected.logits)
    as_tuple = model.train()(**batch, return_dict=False)
    torch.testing.assert_close(as_tuple[0], expected.loss)
    assert torch.equal(as_tuple[1], expected.logits)


@pytest.mark.parametrize("training", [False, True])
def test_inference_mode_gives_the_same_logits_and_loss(models, training):
    model = lean(models.put_on(models.make_model("llama"))).train(training)
    batch = models.make_batch()
    with torch.no_grad():
        expected = model(**batch).loss, model.eval()(input_ids=batch["input_ids"]).logits
    with torch.inference_mode():
        found = model.train(training)(**batch).loss, model.eval()(input_ids=batch["input_ids"]).logits
    torch.testing.assert_close(found, expected)


def test_head_is_whole_again_after_an_error(models):
    model = lean(models.put_on(models.make_model("llama")))
    with pytest.raises(IndexError):
        model(input_ids=torch.tensor([[0, 1000]]), labels=torch.tensor([[0, 1]]))
    assert "forward" not in model.lm_head.__dict__
    bad = models.make_batch()
    with pytest.raises((IndexError, RuntimeError)):
        model(input_ids=bad["input_ids"], labels=bad["labels"] + 1000)
    assert "forward" not in model.lm_head.__dict__


def test_tied_head_gets_both_gradients(models):
    model = models.make_model("llama", tie_word_embeddings=True)
    assert model.lm_head.weight is model.model.embed_tokens.weight
    _, expected = models.train_step(model)
    _, grads = models.train_step(lean(model))
    models.assert_same(grads, expected, 1e-5)


def test_signature_is_that_of_the_model(models):
    model = models.make_model("llama")
    expected = inspect.signature(model.forward)
    assert inspect.signature(lean(model).forward) == expected


def test_saved_bytes_of_a_layer_are_the_least(models):
    """Residual twice, q, k, v, the attention's output, gate and up; and what is of size r or heads."""
    shape = {"hidden_size": 64, "intermediate_size": 160, "num_attention_heads": 4, "num_key_value_heads": 4}
    batch = models.make_batch(shape=(2, 64))

    def layer_bytes(saver):
        few, many = (
            saved_bytes(saver(models.put_on(models.make_model("llama", num_hidden_layers=n, **shape))), batch)
            for n in (1, 2)
        )
        return many - few

    tokens = 2 * 64
    h, gate, r, lse = tokens * 64 * 4, tokens * 160 * 4, tokens * 2 * 4, tokens * 4 * 4
    assert layer_bytes(lean) == 6 * h + 2 * gate + 7 * r + lse
    assert layer_bytes(lean) < 0.65 * layer_bytes(unlean)


def test_logits_are_never_kept(models):
    batch = models.make_batch(vocabulary=2048, shape=(2, 64))
    model = models.put_on(models.make_model("llama", vocab_size=2048, num_hidden_layers=1))
    logits = 2 * 64 * 2048 * 4
    plain = saved_bytes(model, batch)
    assert plain > logits > 3 * saved_bytes(lean(model), batch)


def test_a_compressed_model_of_low_rank_layers_is_lean(models):
    model = models.put_on(models.make_model("llama"))
    for module in model.modules():
        if isinstance(module, SumLinear):  # without the dense base: two low-rank terms
            term = module.terms["default"]
            module.terms = nn.ModuleDict({"low_rank": copy.deepcopy(term), "adapter": term})
    batch = models.make_batch()
    plain, (_, expected) = saved_bytes(model, batch), models.train_step(model)
    _, grads = models.train_step(lean(model))
    models.assert_same(grads, expected, 1e-4)
    assert lean_report(model).lean["sum_linear"] == 14 and saved_bytes(model, batch) < 0.8 * plain


class Odd(nn.Module):
    """A gated MLP with the usual children and another formula."""

    def __init__(self):
        super().__init__()
        self.gate_proj, self.up_proj, self.down_proj = nn.Linear(4, 6), nn.Linear(4, 6), nn.Linear(6, 4)
        self.act_fn = nn.SiLU()

    def forward(self, x):
        return self.down_proj(self.act_fn(self.gate_proj(x)) + self.up_proj(x))


def test_what_it_cannot_handle_is_named_and_untouched():
    model = nn.Sequential(Odd())
    x = torch.randn(3, 4, generator=torch.Generator().manual_seed(0))
    expected = model(x)
    report = lean_report(lean(model))
    assert torch.equal(model(x), expected)
    assert "not the usual one" in report.left["0"]
    assert "no output head" in report.left[""]
    assert report.lean == {"plain_linear": 3, "elementwise": 1}
    assert "left as it is: 0:" in str(report)


def test_report_says_when_it_is_off_and_when_eager_attention_keeps_its_matrix(models):
    model = models.make_model("llama", attn_implementation="eager")
    assert "switches it on" in lean_report(model).left["model.norm"]
    assert "sdpa" in lean_report(lean(model)).left["model.layers.0.self_attn"]


def test_an_input_changed_in_place_is_not_recomputed_from_its_source():
    norm, down = lean(nn.Sequential(nn.LayerNorm(4), nn.Linear(4, 2)))
    x = torch.randn(3, 4, generator=torch.Generator().manual_seed(0), requires_grad=True)
    y = norm(x)
    y.mul_(3)
    down(y).sum().backward()
    torch.testing.assert_close(down.weight.grad, y.detach().sum(0).expand(2, 4))


def test_a_watched_activation_stays_in_the_graph(models):
    model = lean(models.make_model("llama"))
    seen = []
    handle = model.model.layers[0].mlp.act_fn.register_forward_hook(lambda module, args, out: seen.append(out))
    ids = torch.arange(8).view(1, 8)
    model(input_ids=ids, labels=ids)
    assert len(seen) == 1 and seen[0].grad_fn is not None
    handle.remove()


def test_a_second_backward_pass_through_the_same_graph(models):
    model = lean(models.put_on(models.make_model("llama")))
    loss = model(**models.make_batch()).loss
    loss.backward(retain_graph=True)
    once = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
    loss.backward()
    models.assert_same({n: p.grad / 2 for n, p in model.named_parameters() if p.grad is not None}, once, 1e-5)


def test_trainer_learns_as_without(models, tmp_path):
    from transformers import Trainer, TrainingArguments

    batch = models.make_batch()
    data = [{key: value[i] for key, value in batch.items()} | {"unused": 1} for i in (0, 1)] * 4
    losses = []
    for saver in (unlean, lean):
        model = saver(models.put_on(models.make_model("llama")))
        arguments = TrainingArguments(
            str(tmp_path),
            per_device_train_batch_size=2,
            gradient_accumulation_steps=2,
            max_steps=3,
            logging_steps=1,
            learning_rate=1e-2,
            eval_strategy="steps",
            eval_steps=3,
            report_to=[],
            save_strategy="no",
            use_cpu=True,
            disable_tqdm=True,
        )
        trainer = Trainer(model, arguments, train_dataset=data, eval_dataset=data)
        trainer.train()
        losses.append([row.get("loss", row.get("eval_loss")) for row in trainer.state.log_history][:-1])
    assert losses[0] == pytest.approx(losses[1], rel=1e-4)
    assert losses[0][-1] < losses[0][0]
