"""Silent heads: the clip and the gates against plain loops, whole training, and what cannot be."""

from __future__ import annotations

import math
from pathlib import Path

import pytest
import torch
import transformers as hf
from torch import Tensor, nn
from transformers import AutoModelForCausalLM

import weft
from weft.errors import WeftError
from weft.kernels.clipped_attention import clipped_attention, clipped_softmax
from weft.runs.loading import load_tokenizer
from weft.testing_adapters import task, tiny_gpt2
from weft.testing_grafts import tiny_decoder
from weft.train.recipe import Recipe
from weft.verbs.fresh import Structure, restructure
from weft.verbs.pretrain import pretrain, run

NAME = "quantizable-attention"
CLIP = {"gate": None, "alpha": 12.0, "length": 24, "whole": True}


@torch.no_grad()
def logits(model: nn.Module, **inputs: Tensor) -> Tensor:
    out: Tensor = model(**({"input_ids": task()[0]["input_ids"]} | inputs)).logits
    return out


def test_the_clipped_softmax_is_its_formula_entry_by_entry_and_the_plain_one_without_a_clip():
    s = torch.randn(3, 7, generator=torch.Generator().manual_seed(0), dtype=torch.float64) * 3
    found = clipped_softmax(s, -0.1, 1.2)
    for row, line in zip(s.tolist(), found.tolist(), strict=True):
        total = sum(math.exp(v) for v in row)
        wanted = [min(1.0, max(0.0, 1.3 * math.exp(v) / total - 0.1)) for v in row]
        assert line == pytest.approx(wanted, abs=1e-14)
    assert torch.equal(clipped_softmax(s, 0.0, 1.0), s.softmax(-1))


@pytest.mark.parametrize(("gamma", "threshold"), [(-0.025, 0.0244), (-12 / 512, 0.0229)])
def test_the_threshold_of_the_paper(gamma, threshold):
    p = torch.tensor([threshold - 1e-4, threshold + 1e-4], dtype=torch.float64)
    found = clipped_softmax(torch.cat([p, 1 - p.sum(0, keepdim=True)]).log(), gamma, 1.0)
    assert found[0] == 0 and found[1] > 0


def test_rows_sum_to_one_at_most_a_head_can_be_silent_and_zeros_take_no_gradient():
    s = torch.zeros(1, 64, dtype=torch.float64)
    assert not clipped_softmax(s, -0.025, 1.0).any(), "a head with nothing to say is silent"
    q, k, v = (torch.randn(5, 8, generator=torch.Generator().manual_seed(i), dtype=torch.float64) for i in range(3))
    v.requires_grad_(True)
    logits = (3 * q) @ k.mT
    p = clipped_softmax(logits, -0.2, 1.0)
    assert bool((p.sum(-1) <= 1).all()) and bool((p == 0).any())
    clipped_attention(3 * q, k, v, None, 1.0, -0.2, 1.0).sum().backward()
    torch.testing.assert_close(v.grad, p.sum(0).unsqueeze(1).expand_as(v))


def test_masked_keys_stay_hidden():
    q, k, v = (torch.randn(4, 8, generator=torch.Generator().manual_seed(i)) for i in range(3))
    mask = torch.full((4, 4), torch.finfo(torch.float32).min).triu(1)
    out = clipped_attention(q, k, v, mask, 1.0, -0.05, 1.0)
    v[3] = 1e6
    assert torch.equal(clipped_attention(q, k, v, mask, 1.0, -0.05, 1.0)[:3], out[:3])


@pytest.mark.parametrize("gate", ["head", "mlp", "all"])
def test_gates_scale_each_head_s_sum_by_its_own_inputs(gate):
    """The attention layer by itself: what comes out before o_proj, head by head."""
    model = weft.adapt(tiny_decoder(), NAME, gate=gate, std=0.5, rescale=False, seed=1)
    layer, seen = model.model.layers[0].self_attn, {}
    layer.register_forward_pre_hook(lambda m, a, k: seen.update(x=k["hidden_states"]), with_kwargs=True)
    hook = layer.o_proj.register_forward_pre_hook(lambda m, a: seen.update(out=a[0]))
    logits(model)
    gated, x, part = seen["out"], seen["x"], layer.weft_silencer
    with weft.disable(model):
        logits(model)
    hook.remove()
    bare = seen["out"]
    for h in range(4):
        mine = x if gate == "all" else x[..., 8 * h : 8 * h + 8]
        if gate == "mlp":
            mine = torch.relu(mine @ part.inner[h].T + part.inner_offset[h])
        opened = torch.sigmoid(mine @ part.G[h] + part.offset[h])
        wanted = bare[..., 8 * h : 8 * h + 8] * opened.unsqueeze(-1)
        torch.testing.assert_close(gated[..., 8 * h : 8 * h + 8], wanted, rtol=1e-5, atol=1e-6)


def test_gates_without_weights_are_the_model_s_own_attention():
    for gate in ("head", "mlp", "all"):
        model = weft.adapt(tiny_decoder(), NAME, gate=gate, std=0.0, probability=0.1)
        torch.testing.assert_close(logits(model), logits(tiny_decoder()), rtol=1e-5, atol=1e-5)
    model = weft.adapt(tiny_decoder(), NAME)
    assert weft.trainable(model).count == 2 * 4 * (8 + 1)


def test_a_clipped_model_decodes_with_a_cache_as_the_whole_text_and_hides_the_future():
    model, ids = weft.adapt(tiny_decoder(), NAME, **CLIP), task()[0]["input_ids"][:1, :12]
    whole, cache, parts = logits(model, input_ids=ids), None, []
    assert not torch.allclose(whole, logits(tiny_decoder(), input_ids=ids), atol=1e-2)
    with torch.no_grad():
        for place in range(12):
            out = model(input_ids=ids[:, place : place + 1], past_key_values=cache, use_cache=True)
            cache, _ = out.past_key_values, parts.append(out.logits)
    torch.testing.assert_close(torch.cat(parts, 1), whole, rtol=1e-4, atol=1e-5)
    other = ids.clone()
    other[0, 8:] = (other[0, 8:] + 1) % 32
    torch.testing.assert_close(logits(model, input_ids=other)[:, :8], whole[:, :8])


def test_whole_training_keeps_all_weights_trained_and_is_saved_as_a_model_alone(tmp_path):
    model = tiny_decoder()
    model.get_parameter("lm_head.weight").requires_grad_(False)
    names = {name for name, p in model.named_parameters() if p.requires_grad}
    weft.adapt(model, NAME, whole=True)
    trained = {name for name, p in model.named_parameters() if p.requires_grad}
    opened = {name.replace(".terms.base.matrix", ".weight") for name in trained}  # one layer is a sum of one term
    assert names < opened and "lm_head.weight" not in trained
    with pytest.raises(WeftError, match="own weights are trained along"):
        weft.save_adapter(model, tmp_path / "graft")
    assert not (tmp_path / "graft").exists()
    with torch.no_grad():
        model.model.layers[0].mlp.up_proj.weight.add_(0.1)
    model.save_pretrained(tmp_path / "model")
    opened = AutoModelForCausalLM.from_pretrained(tmp_path / "model")
    assert torch.equal(logits(opened), logits(model))
    assert all(p.requires_grad for p in opened.parameters())
    weft.remove_adapter(model)
    assert {name for name, p in model.named_parameters() if p.requires_grad} == names


def test_a_fresh_model_is_trained_whole_and_resumes_to_the_same_bytes(tmp_path):
    tokenizer, structure = load_tokenizer("pico"), Structure.of(NAME, None, {"alpha": 3.2, "length": 24})
    assert structure.options["std"] is None and not structure.options["rescale"] and structure.options["whole"]
    assert Structure.of(NAME, given=True).options["std"] == 0.01
    (tmp_path / "text.txt").write_text("".join(f"def f{i}(a):\n    return a + {i}\n" for i in range(200)))
    recipe = Recipe(steps=8, lr=5e-3, window=24, batch=4, warmup=2, clip=0.0, save_every=4, log_every=1)

    def made() -> nn.Module:
        torch.manual_seed(0)
        return restructure(AutoModelForCausalLM.from_config(pico_like()), structure, seed=0)

    def go(model: nn.Module, place: Path) -> dict[str, object]:
        place.mkdir(exist_ok=True)
        return pretrain(model, tokenizer, [tmp_path / "text.txt"], recipe, place, structure=structure)

    whole, again = made(), made()
    done = go(whole, tmp_path / "one")
    assert done["method"] == NAME and done["loss_last"] < done["loss_first"] - 0.3
    assert any((tmp_path / "one").glob("checkpoint-4*")) or any((tmp_path / "one").glob("checkpoint-*"))
    for found in (tmp_path / "one").glob("checkpoint-8"):
        for file in sorted(found.rglob("*"), reverse=True):
            file.unlink() if file.is_file() else file.rmdir()
        found.rmdir()
    go(again, tmp_path / "one")
    state = again.state_dict()
    assert all(torch.equal(tensor, state[name]) for name, tensor in whole.state_dict().items())
    before = tiny_decoder(blocks=1).model.layers[0].mlp.up_proj.weight
    assert not torch.equal(whole.model.layers[0].mlp.up_proj.weight, before)


def test_the_verb_says_what_it_would_hold():
    told = run(size="9m", method=NAME, plan=True, steps=4, window=32, batch=2, device="cpu")
    assert told["method"] == NAME and told["rank"] is None


def test_the_verb_writes_a_model_that_opens(tmp_path):
    (tmp_path / "text.txt").write_text("".join(f"def f{i}(a):\n    return a + {i}\n" for i in range(200)))
    how = {"steps": 2, "window": 32, "batch": 2, "device": "cpu", "eval_windows": 1, "log_every": 1}
    model = AutoModelForCausalLM.from_config(pico_like())
    model.save_pretrained(tmp_path / "model")
    load_tokenizer("pico").save_pretrained(tmp_path / "model")
    texts = {"text": tmp_path / "text.txt", "eval_text": tmp_path / "text.txt"}
    done = run(tmp_path / "out", model=str(tmp_path / "model"), method=NAME, **texts, **how)
    opened = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    assert not any("coverage" in key or "layers" in key for key in done)
    assert any("weft_silencer" in name for name, _ in opened.named_parameters())


def pico_like() -> object:
    """A small configuration for pico's tokenizer."""
    config = tiny_decoder(blocks=1).config
    config.vocab_size = len(load_tokenizer("pico"))
    return config


@pytest.mark.parametrize(
    ("options", "sentence"),
    [
        ({"gate": "gru"}, "no gate of attention called 'gru'"),
        ({"probability": 1.0}, "probability is 1.0"),
        ({"alpha": -1.0}, "alpha is -1.0, length 512 and zeta 1.0"),
        ({"gate": None, "whole": True}, "the model's own attention"),
        ({"gate": None, "alpha": 12.0}, "no numbers of its own to train: give whole=true"),
    ],
)
def test_wrong_options_are_sentences(options, sentence):
    model = tiny_decoder()
    with pytest.raises(WeftError, match=sentence):
        weft.adapt(model, NAME, **options)
    assert torch.equal(logits(model), logits(tiny_decoder()))


SIZES = {
    "vocab_size": 32, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 1, "num_attention_heads": 4,
    "num_key_value_heads": 2, "head_dim": 8, "pad_token_id": 0, "initializer_range": 0.2,
}  # fmt: skip
ROUTED = {"num_local_experts": 2, "num_experts": 2, "num_experts_per_tok": 1, "moe_intermediate_size": 16}
TOWER = {"hidden_size": 24, "intermediate_size": 48, "num_hidden_layers": 1, "num_attention_heads": 4}


def sinks():
    return hf.GptOssForCausalLM(hf.GptOssConfig(**SIZES, **ROUTED))


def gated_queries():
    full = {"layer_types": ["full_attention"], "shared_expert_intermediate_size": 16}
    return hf.Qwen3NextForCausalLM(hf.Qwen3NextConfig(**SIZES, **ROUTED, **full))


def two_towers():
    vision = {**TOWER, "image_size": 16, "patch_size": 8}
    tokens = {"mm_tokens_per_image": 4, "image_token_index": 30, "boi_token_index": 31, "eoi_token_index": 29}
    return hf.Gemma3ForConditionalGeneration(hf.Gemma3Config(text_config=SIZES, vision_config=vision, **tokens))


@pytest.mark.parametrize("graft", [NAME, "ntk-attention"])
@pytest.mark.parametrize("make", [gated_queries, two_towers])
def test_without_weights_models_of_several_parts_and_gated_queries_are_as_they_were(make, graft):
    model = make().eval()
    before = logits(model)
    weft.adapt(model, graft, std=0.0)
    assert torch.allclose(logits(model), before, atol=1e-5)


@pytest.mark.parametrize("graft", [NAME, "ntk-attention"])
def test_what_the_attention_would_no_longer_do_is_refused(graft):
    with pytest.raises(WeftError, match="GptOssForCausalLM cannot be exchanged .it has sinks of its own"):
        weft.adapt(sinks(), graft)
    capped = hf.Gemma2ForCausalLM(hf.Gemma2Config(**SIZES))
    with pytest.raises(WeftError, match="it has attn_logit_softcapping of its own"):
        weft.adapt(capped, graft)


def test_what_it_does_not_fit_is_refused():
    with pytest.raises(WeftError, match="cannot be exchanged"):
        weft.adapt(tiny_gpt2(), NAME)
    model = tiny_decoder()
    model.config.attn_logit_softcapping = 30.0
    with pytest.raises(WeftError, match="attn_logit_softcapping of its own"):
        weft.adapt(model, NAME)
    for given, sentence in (
        ({"method": NAME, "options": {"whole": False}}, "Pre-training trains all weights"),
        ({"method": NAME, "rank": 4}, "--rank has no meaning for --method quantizable-attention"),
        ({"method": "ntk-attention"}, "train it by weft finetune --method ntk-attention"),
    ):
        with pytest.raises(WeftError, match=sentence):
            Structure.of(**given)
