"""A mixture's experts: opened they compute the same, every verb reaches them, and fused they are what they were."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import transformers as hf
from torch import Tensor, nn

import weft
from weft.errors import WeftError
from weft.terms import SumLinear
from weft.terms.experts import Experts, fuse, open_experts

sys.path.insert(0, str(Path(__file__).parents[2] / "docs"))
from architectures import CASES, build

MIXTURES = ("Mixtral", "Qwen3-MoE", "DeepSeek-V3", "GPT-OSS", "Llama 4", "DBRX")
CHOOSING = MIXTURES[:4]  # those classes that let choose how the products are computed
IDS = torch.randint(3, 64, (4, 12), generator=torch.Generator().manual_seed(0))
MASK = torch.ones_like(IDS)
MASK[0, 5:] = MASK[2, 9:] = 0  # padded on the right
BATCH = {"input_ids": IDS, "attention_mask": MASK}
GATE_UP = "model.layers.1.mlp.experts.{}.gate_up"

pytestmark = pytest.mark.filterwarnings("ignore:The linear layers of this", "ignore:Fewer tokens than a layer")


def mixture(name: str = "Mixtral") -> hf.PreTrainedModel:
    """Tiny, of weights so large that experts and routes differ."""
    torch.manual_seed(0)
    model = build(CASES[name])
    for parameter in model.parameters():
        nn.init.normal_(parameter, std=0.2) if parameter.dim() > 1 else None
    return model


def unreachable(model: hf.PreTrainedModel, expert: int = 2) -> hf.PreTrainedModel:
    """In the second block, what was routed to that expert goes to the first of the others that the token has not."""

    def elsewhere(module: nn.Module, args: object, output: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        *others, chosen = output
        free = torch.tensor([min({0, 1, 3} - set(row)) for row in chosen.tolist()])
        return (*others, torch.where(chosen == expert, free[:, None], chosen))

    model.model.layers[1].mlp.gate.register_forward_hook(elsewhere)
    return model


def experts_of(model: nn.Module) -> str:
    """The name of the last block's experts."""
    return [name for name, _ in model.named_modules() if name.endswith(".experts")][-1]


@torch.no_grad()
def logits(model: nn.Module) -> Tensor:
    return model(**BATCH).logits


def state(model: nn.Module) -> dict[str, Tensor]:
    return {name: tensor.clone() for name, tensor in model.state_dict().items()}


def assert_state(model: nn.Module, before: dict[str, Tensor]) -> None:
    now = model.state_dict()
    assert list(now) == list(before) and all(torch.equal(now[name], before[name]) for name in before)


HOW = [(name, how) for name in CHOOSING for how in ("eager", "grouped_mm", "batched_mm")]


@pytest.mark.parametrize("name, implementation", [*HOW, ("Llama 4", None), ("DBRX", None)])
def test_opened_they_compute_the_same_and_fused_they_are_what_they_were(name: str, implementation: str | None) -> None:
    model = mixture(name)
    if implementation:
        model.set_experts_implementation(implementation)
    before, expected, place = state(model), logits(model), experts_of(model)
    kind = type(model.get_submodule(place))
    open_experts(model)
    torch.testing.assert_close(logits(model), expected, atol=1e-4, rtol=1e-4)
    assert isinstance(model.get_submodule(place), Experts)
    fuse(model)
    assert type(model.get_submodule(place)) is kind
    assert_state(model, before)
    assert torch.equal(logits(model), expected)


def test_gradients_of_sorted_and_glued_experts_are_those_of_the_stack() -> None:
    for name, leaf, short, turned in (("Llama 4", "down_proj", "down", True), ("DBRX", "mlp.v1", "up", False)):
        model, other, place = mixture(name), mixture(name), experts_of(mixture(name))
        open_experts(other)
        for one in (model, other):
            one(**BATCH, labels=IDS).loss.backward()
        stack = model.get_parameter(f"{place}.{leaf}").grad
        for i, gradient in enumerate(stack.view(4, -1, stack.shape[-1])):
            found = other.get_parameter(f"{place}.{i}.{short}.weight").grad
            expected = gradient.T if turned else gradient
            found = torch.zeros_like(expected) if found is None else found
            torch.testing.assert_close(found, expected, atol=1e-5, rtol=1e-4)


def test_gradients_are_those_of_the_stack() -> None:
    model, other = mixture("GPT-OSS"), mixture("GPT-OSS")
    open_experts(other)
    for one in (model, other):
        one(**BATCH, labels=IDS).loss.backward()
    experts = model.model.layers[1].mlp.experts
    for i in range(4):
        layer = other.get_submodule(GATE_UP.format(i))
        torch.testing.assert_close(layer.weight.grad, experts.gate_up_proj.grad[i].T, atol=1e-5, rtol=1e-4)
        torch.testing.assert_close(layer.bias.grad, experts.gate_up_proj_bias.grad[i], atol=1e-5, rtol=1e-4)


def test_only_those_that_are_asked_for_are_opened() -> None:
    model = mixture()
    weft.adapt(model, "lora", rank=2, targets="*layers.1.*experts.3.*")
    assert [name for name, m in model.named_modules() if isinstance(m, SumLinear)] == [
        "model.layers.1.mlp.experts.3.gate_up",
        "model.layers.1.mlp.experts.3.down",
    ]
    assert not isinstance(model.model.layers[0].mlp.experts, Experts)


def test_those_that_are_left_out_stay_as_they_are() -> None:
    model = mixture()
    weft.adapt(model, "lora", rank=2, targets="!*experts*")
    assert not any("experts" in name for name, m in model.named_modules() if isinstance(m, SumLinear))
    weft.adapt(model, "lora", rank=2, targets=["*layers.1.*experts.3.*", "!*experts.3.down"], name="more")
    sums = [name for name, m in model.named_modules() if isinstance(m, SumLinear) and "experts" in name]
    assert sums == ["model.layers.1.mlp.experts.3.gate_up"]


@pytest.mark.parametrize(
    "fails",
    [
        lambda m: weft.adapt(m, "lora", rank=1000),
        lambda m: weft.adapt(m, "lora", targets=["*experts*", "nothing"]),
        lambda m: weft.compress(m, "svd-llm", budget=0.6),
        lambda m: weft.quantize(m, "lq-lora", bits=1.0),
        lambda m: weft.inspect(m, "*nothing*"),
    ],
    ids=["adapt", "targets", "compress", "quantize", "inspect"],
)
def test_a_verb_that_fails_leaves_the_model_as_it_was(fails) -> None:  # type: ignore[no-untyped-def]
    model = mixture()
    before = state(model)
    with pytest.raises(WeftError):
        fails(model)
    assert_state(model, before)


def test_looking_changes_nothing() -> None:
    model = mixture()
    before = state(model)
    assert len(weft.inspect(model, "*experts.*").matrices) == 16
    stats = weft.calibrate(model, [BATCH], ["input_moment"])
    assert stats["model.layers.0.mlp.experts.1.down"]["input_moment"].shape == (48, 48)
    assert_state(model, before)


@pytest.mark.parametrize("name", MIXTURES)
def test_adapters_are_saved_loaded_taken_off_and_merged(name: str, tmp_path: Path) -> None:
    model = mixture(name)
    before, expected = state(model), logits(model)
    weft.adapt(model, "lora", rank=2)
    torch.testing.assert_close(logits(model), expected, atol=1e-4, rtol=1e-4)
    with torch.no_grad():
        for parameter in weft.trainable(model).parameters.values():
            parameter.add_(0.05)
    trained = logits(model)
    weft.save_adapter(model, tmp_path / "adapter")
    assert not (tmp_path / "adapter" / "adapter_config.json").exists()
    again = weft.load_adapter(mixture(name), tmp_path / "adapter")
    torch.testing.assert_close(logits(again), trained)
    weft.remove_adapter(model)
    assert_state(model, before)
    weft.merge_adapter(again)
    assert list(again.state_dict()) == list(before)
    torch.testing.assert_close(logits(again), trained, atol=1e-3, rtol=1e-3)


def test_biases_are_merged_where_the_tensors_have_them_and_refused_elsewhere() -> None:
    for name, biased in (("GPT-OSS", True), ("Mixtral", False)):
        model = mixture(name)
        weft.compress(model, "lord", budget=0.9, layers="*experts*", batches=[BATCH] * 4)
        before = logits(model)
        if biased:
            weft.merge(model)
            torch.testing.assert_close(logits(model), before, atol=1e-3, rtol=1e-3)
        else:
            with pytest.raises(WeftError, match=r"experts\.\d\.\w+ has got a bias, for which a plain Mixtral"):
                weft.merge(model)
            assert torch.equal(logits(model), before)


@pytest.mark.parametrize("name", MIXTURES)
def test_codes_of_experts_alone_are_saved_opened_and_refused_by_others(name: str, tmp_path: Path) -> None:
    model = mixture(name)
    plain = list(model.state_dict())
    weft.quantize(model, "int8", targets="*experts.[02].*")
    model.save_pretrained(tmp_path / "codes")
    loaded = type(model).from_pretrained(tmp_path / "codes")
    assert torch.equal(logits(loaded), logits(model))
    assert type(loaded.get_submodule(f"{experts_of(loaded)}.1.down")) is nn.Linear
    expected = logits(loaded)
    weft.merge(loaded)
    assert list(loaded.state_dict()) == plain
    torch.testing.assert_close(logits(loaded), expected, atol=1e-4, rtol=1e-4)
    loaded.save_pretrained(tmp_path / "merged")
    again, info = type(model).from_pretrained(tmp_path / "merged", output_loading_info=True)
    assert not any(info[kind] for kind in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    torch.testing.assert_close(logits(again), expected, atol=1e-4, rtol=1e-4)


def test_without_weft_they_are_refused(tmp_path: Path) -> None:
    for name in MIXTURES:
        model = mixture(name)
        weft.quantize(model, "int8", targets="*experts.[02].*")
        model.save_pretrained(tmp_path / name)
    code = (
        "import sys, json; sys.modules['weft'] = None\n"
        "import transformers\n"
        "for name in json.loads(sys.argv[2]):\n"
        "    try: transformers.AutoModelForCausalLM.from_pretrained(f'{sys.argv[1]}/{name}')\n"
        "    except RuntimeError as error: assert 'ignore_mismatched_sizes' in str(error), error\n"
        "    else: raise SystemExit(f'{name} was opened')\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", code, str(tmp_path), json.dumps(MIXTURES)], capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr[-1500:]


def called_with(model: hf.PreTrainedModel) -> tuple[Tensor, ...]:
    """The arguments of the last experts: hidden states and, of most classes, the experts chosen (tokens, k)."""
    seen: list[tuple[Tensor, ...]] = []
    handle = model.get_submodule(experts_of(model)).register_forward_pre_hook(lambda m, args: seen.append(args))
    logits(model)
    handle.remove()
    return seen[0]


def routed_to(model: hf.PreTrainedModel, expert: int) -> Tensor:
    """What that expert sees (tokens, H), by a plain loop: of tokens that are no padding."""
    if model.config.model_type == "llama4_text":  # called with all tokens for each expert, scaled by their scores
        hidden = called_with(model)[0].view(4, -1, 32)[expert]
        return hidden[[t for t in range(len(hidden)) if MASK.flatten()[t] and hidden[t].any()]]
    hidden, chosen, _ = called_with(model)
    hidden = hidden.flatten(0, -2)
    return hidden[[t for t in range(len(hidden)) if MASK.flatten()[t] and expert in chosen[t].tolist()]]


@pytest.mark.parametrize("name", MIXTURES)
def test_statistics_are_of_the_tokens_that_were_routed_there(name: str) -> None:
    """Against a loop over the router's choices; padding, which is routed too, does not count."""
    model = mixture(name)
    place, short = experts_of(model), "up" if name == "DBRX" else "gate_up"
    seen = [routed_to(model, i).double() for i in range(4)]
    stats = weft.calibrate(model, [BATCH], ["input_moment"], layers=f"{place}.*.{short}")
    for i, x in enumerate(seen):
        if not len(x):
            assert f"{place}.{i}.{short}" not in stats
            continue
        moment = stats[f"{place}.{i}.{short}"]["input_moment"]
        torch.testing.assert_close(moment, x.T @ x / len(x), atol=1e-5, rtol=1e-5)


def test_fisher_sums_are_by_sequence() -> None:
    """Against the gradients of the fused tensor, one sequence at a time."""
    model = mixture()
    stats = weft.calibrate(model, [{"input_ids": IDS}], ["fisher_rows", "fisher_columns"], layers=GATE_UP.format("*"))
    stack, rows, columns = model.model.layers[1].mlp.experts.gate_up_proj, 0, 0
    for ids in IDS:
        loss = model(input_ids=ids[None], labels=ids[None]).loss * (len(ids) - 1)
        (gradient,) = torch.autograd.grad(loss, stack)
        rows, columns = rows + gradient.square().sum(2), columns + gradient.square().sum(1)
    for i in range(4):
        found = stats[GATE_UP.format(i)]
        torch.testing.assert_close(found["fisher_rows"].float(), rows[i] / len(IDS), atol=1e-5, rtol=1e-3)
        torch.testing.assert_close(found["fisher_columns"].float(), columns[i] / len(IDS), atol=1e-5, rtol=1e-3)


@pytest.mark.parametrize("sequential", [False, True])
@pytest.mark.parametrize("method", ["svd-llm", "kfac-svd"])
def test_an_expert_that_no_token_reaches_stays_and_is_named(method: str, sequential: bool) -> None:
    model = unreachable(mixture())
    assert 2 not in called_with(model)[1]
    weight = model.model.layers[1].mlp.experts.gate_up_proj[2].clone()
    with pytest.warns(UserWarning, match=r"reaches model\.layers\.1\.mlp\.experts\.2\.gate_up, .*stay as they are"):
        done = weft.compress(model, method, budget=0.6, batches=[BATCH], sequential=sequential)
    assert done.allocation[GATE_UP.format(2)] is None and done.allocation[GATE_UP.format(1)] is not None
    assert done.allocation.spent <= 0.6 * done.allocation.total
    assert torch.equal(model.get_submodule(GATE_UP.format(2)).weight, weight)
    assert logits(model).isfinite().all()


def test_adapters_from_data_leave_an_unreached_expert_out() -> None:
    model = unreachable(mixture())
    with pytest.warns(UserWarning, match=r"reaches model\.layers\.1\.mlp\.experts\.2\.gate_up"):
        weft.adapt(model, "eva", rank=2, batches=[BATCH])
    assert type(model.get_submodule(GATE_UP.format(2))) is nn.Linear
    assert isinstance(model.get_submodule(GATE_UP.format(1)), SumLinear)


def test_statistics_given_serve_as_batches_do() -> None:
    model, other = unreachable(mixture()), unreachable(mixture())
    stats = weft.calibrate(model, [BATCH], weft.needs("svd-llm"))
    assert GATE_UP.format(2) not in stats
    with pytest.warns(UserWarning, match=r"experts\.2\.gate_up"):
        weft.compress(model, "svd-llm", budget=0.6, stats=stats, sequential=False)
        weft.compress(other, "svd-llm", budget=0.6, batches=[BATCH], sequential=False)
    torch.testing.assert_close(logits(model), logits(other), atol=1e-5, rtol=1e-5)


def test_an_allocation_is_used_again() -> None:
    first = weft.compress(unreachable(mixture()), "svd", budget=0.6)
    again = weft.compress(unreachable(mixture()), "svd", allocate=dict(first.allocation))
    assert dict(again.allocation) == dict(first.allocation)


@pytest.mark.parametrize("method", ["nf4", ["nf3", "eora"]])
def test_chains_and_codes(method, tmp_path: Path) -> None:  # type: ignore[no-untyped-def]
    model = mixture()
    weft.compress(model, method, budget="5 bits", batches=[BATCH])
    model.save_pretrained(tmp_path)
    assert torch.equal(logits(type(model).from_pretrained(tmp_path)), logits(model))


def test_what_codes_lost_is_made_good_from_the_original() -> None:
    original, model = mixture(), mixture()
    before = state(original)
    weft.compensate(weft.quantize(model, "nf2"), original, [BATCH], rank=8)
    assert_state(original, before)
    expected = logits(original)
    alone = logits(weft.quantize(mixture(), "nf2"))
    assert (logits(model) - expected).norm() < (alone - expected).norm()
