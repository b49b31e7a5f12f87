"""put: what stands around a layer stays when a sum of terms takes its place."""

from __future__ import annotations

import pytest
import torch
from torch import nn
from transformers.pytorch_utils import Conv1D

from weft.errors import WeftError
from weft.terms import Dense, Int8, LowRank, SumLinear
from weft.terms.adapters import Adapter, attach
from weft.terms.put import KEEP, put


def stack(bias: bool = True) -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(4, 6, bias=bias), nn.ReLU(), nn.Linear(6, 5, bias=bias))


def code(layer: nn.Module) -> dict[str, Int8]:
    return {"code": Int8.from_matrix(layer.weight.detach())}


def test_the_function_is_that_of_the_terms() -> None:
    model, x = stack(), torch.randn(3, 4)
    W = model[0].weight.detach()
    expected = model(x)
    made = put(model, "0", {"one": Dense.from_matrix(W / 2), "two": Dense.from_matrix(W / 2)})
    assert model[0] is made
    torch.testing.assert_close(model(x), expected)


@pytest.mark.parametrize("training", [True, False])
def test_mode_is_kept(training: bool) -> None:
    model = stack().train(training)
    made = put(model, "0", {"a": LowRank.from_factors(torch.ones(6, 2), torch.ones(2, 4), dropout=0.5)})
    assert {m.training for m in made.modules()} == {training}


def test_the_bias_is_the_very_parameter_or_another_or_none() -> None:
    model = stack()
    bias = model[0].bias
    assert put(model, "0", code(model[0])).bias is bias
    assert put(model, "2", code(model[2]), KEEP).bias is not None
    model = stack().to(torch.bfloat16)
    model[0].requires_grad_(False)
    given = put(model, "0", code(model[0]), torch.ones(6)).bias
    assert given.dtype == torch.bfloat16 and not given.requires_grad and (given == 1).all()
    assert put(model, "2", code(model[2]), torch.ones(5)).bias.requires_grad
    assert put(model, "2", code(model[2].collapse()), None).bias is None
    assert put(stack(bias=False), "0", code(stack()[0])).bias is None


def test_hooks_are_kept_and_their_handles_remove_them() -> None:
    model, x = stack(), torch.randn(3, 4)
    seen: list[str] = []
    layer = model[0]
    handles = [
        layer.register_forward_pre_hook(lambda module, args: seen.append("pre")),
        layer.register_forward_hook(lambda module, args, kwargs, out: seen.append("post"), with_kwargs=True),
        layer.register_full_backward_hook(lambda module, given, out: seen.append("backward")),
    ]
    put(model, "0", {"dense": Dense.from_matrix(layer.weight)})
    model(x).sum().backward()
    assert seen == ["pre", "post", "backward"]
    for handle in handles:
        handle.remove()
    model(x).sum().backward()
    assert seen == ["pre", "post", "backward"]


def test_accelerates_hook_is_kept() -> None:
    from accelerate.hooks import ModelHook, add_hook_to_module

    class Count(ModelHook):
        calls = 0

        def pre_forward(self, module, *args, **kwargs):  # type: ignore[no-untyped-def]
            self.calls += 1
            return args, kwargs

    model, hook = stack(), Count()
    add_hook_to_module(model[0], hook)
    put(model, "0", code(model[0]))
    model(torch.randn(3, 4))
    assert hook.calls == 1


def test_a_conv1d_is_one_again_when_merged() -> None:
    model = nn.Sequential(Conv1D(6, 4))
    x = torch.randn(3, 4)
    expected = model(x)
    made = put(model, "0", {"dense": Dense.from_matrix(model[0].weight.T)})
    torch.testing.assert_close(model(x), expected)
    assert isinstance(made.collapse(), Conv1D)
    assert put(model, "0", {"dense": Dense.from_matrix(made.dense())}).transposed  # a sum in the place of a sum


def test_a_model_without_data_stays_one() -> None:
    with torch.device("meta"):
        empty = stack()
    assert put(empty, "0", {"a": LowRank(4, 6, 2, device="meta")}).weight.is_meta


def test_refusals_name_the_layer_and_leave_the_model() -> None:
    model = stack()
    term = {"a": LowRank.from_factors(torch.ones(5, 2), torch.ones(2, 4))}
    with pytest.raises(WeftError, match="no linear layer '7' in this Sequential"):
        put(model, "7", term)
    with pytest.raises(WeftError, match="no linear layer '1'"):
        put(model, "1", term)
    with pytest.raises(WeftError, match="The layer 0 is 6 x 4, the terms for it are: a 5 x 4"):
        put(model, "0", term)
    with pytest.raises(WeftError, match="the terms for it are: none"):
        put(model, "0", {})
    assert type(model[0]) is nn.Linear
    attach(model, Adapter("mine", "lora", {"0": {"mine": LowRank.from_factors(torch.ones(6, 2), torch.ones(2, 4))}}))
    with pytest.raises(WeftError, match=r"The layer 0 has adapters on \(mine\)"):
        put(model, "0", {"a": LowRank.from_factors(torch.ones(6, 2), torch.ones(2, 4))})


def test_a_compiled_model_is_looked_into() -> None:
    model = stack()
    put(torch.compile(model), "0", code(model[0]))  # type: ignore[arg-type]
    assert isinstance(model[0], SumLinear)
