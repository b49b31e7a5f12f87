"""The conformance suite of what splits weights (kinds "compress", "quantize" and "compensate"), for our methods and
those of others: `check_splitter("nf3")`, `check_splitter(my_method)` run every property.

    sizes       rise in bytes, and the terms of each store exactly those bytes
    nearer      a larger size is nearer to the weight
    pure        a split draws from its own generator alone, and touches neither the weight nor its terms
    dtype       a bf16 layer gives finite terms in bf16
    nan         a weight that is no number is named
    zeros       a weight of zeros, rows of zeros and inputs that are always zero are terms as any
    budget      a model is brought within its budget, and every layer has the size that the allocation says
    losses      the losses that an allocation reads are those of the terms
    saves       the compressed model's directory opens to the same logits
    resumes     an interrupted run ends on the same bytes
    conv1d      GPT-2's Conv1D layers keep their biases and stay so
    options     an option that there is not is refused
"""

from __future__ import annotations

import copy
import tempfile
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AutoModelForCausalLM

from weft.allocate import Shape
from weft.errors import WeftError
from weft.kernels.normal_float import Format
from weft.linalg.principal import weighted_loss
from weft.methods import METHODS, Method, Site, Split
from weft.methods.base import JointShape, LowRankSplit
from weft.runs.pieces import Store
from weft.seeds import generator
from weft.stats.calibrate import calibrate
from weft.terms import Dense, NormalFloat, SumLinear, Term
from weft.terms.joints import Joint, layers_of
from weft.terms.layers import linear_layers, weight_of
from weft.terms.put import put
from weft.testing_adapters import task, tiny_gpt2, tiny_llama
from weft.verbs.compress import compress
from weft.verbs.survey import Plan, offered, site_of, survey

__all__ = ["PROPERTIES", "check_splitter"]

OUT, IN = 48, 64


def check_splitter(method: str | Method) -> None:
    """Run every property on a method.

    Raises:
        AssertionError: a property does not hold; its name is in the message.
    """
    found = METHODS.find(method, "compress", "quantize", "compensate")
    for name, check in PROPERTIES.items():
        if name in found.exempt:
            continue
        try:
            check(found)
        except AssertionError as error:
            raise AssertionError(f"{found.name}: the property {name!r} does not hold: {error}") from error


def _sites(method: Method, dtype: torch.dtype = torch.float32) -> list[Site]:
    """A layer, or a joint of every sort that the method cuts."""
    if method.joints is None:
        return [_site(method, dtype)]
    model = tiny_llama()
    joints = _joints(model, method)
    plan = Plan(method=method, options={}, layers=tuple(linear_layers(model)), joints=joints)
    stats = calibrate(model, task(), (*method.needs, "input_moment", "output_grad_moment"))
    return [site_of(model.to(dtype), plan, name, stats, None) for name in joints]


def _joints(model: nn.Module, method: Method) -> dict[str, Joint]:
    return {joint.name: joint for joint in method.joints(model, list(linear_layers(model)))} if method.joints else {}


def _site(method: Method, dtype: torch.dtype = torch.float32) -> Site:
    """A layer of 48 x 64 with a spectrum that falls; a compensation finds it in 2-bit codes."""
    draw = torch.Generator().manual_seed(0)
    W = torch.randn(OUT, IN, generator=draw) @ torch.diag(0.95 ** torch.arange(IN)) * 0.1
    x, g, y = (torch.randn(n, 200, generator=draw, dtype=torch.float64) for n in (IN, OUT, OUT))
    moments = {"input_moment": x @ x.mT / 200, "output_grad_moment": g @ g.mT / 200, "output_moment": y @ y.mT / 200}
    moments |= {"input_mean": x.mean(1), "input_abs_mean": x.abs().mean(1), "output_mean": y.mean(1)}
    moments |= {"fisher_rows": g.square().mean(1), "fisher_columns": x.square().mean(1), "mean_grad": W.double()}
    site = Site("layer", {"base": _base(method, W.to(dtype))}, None, None, moments, generator(0, "layer"), dtype)
    return replace(site, original=W) if method.kind == "compensate" else site


def _base(method: Method, W: Tensor) -> Term:
    """What a layer of this weight has before the method: a compensation finds 2-bit codes."""
    return NormalFloat.from_matrix(W, Format(2)) if method.kind == "compensate" else Dense.from_matrix(W)


def _sizes(method: Method, site: Site, itemsize: int = 4) -> list[tuple[Any, int]]:
    shape = Shape(*site.shape, itemsize) if site.joint is None else JointShape.of(site.joint, itemsize)
    return list(method.sizes(shape, method.options({})))


def _split(method: Method, site: Site, size: Any) -> Split:
    assert method.split is not None
    return method.split(replace(site, size=size, nominal=size), **method.options({}))


def _terms(made: Site | Split) -> dict[str, Any]:
    """All terms by role, those of a joint's layers behind theirs."""
    inner = {f"{role}.{k}": term for role, part in made.members.items() for k, term in part.terms.items()}
    return {**made.terms, **inner}


def _error(method: Method, site: Site, size: Any) -> float:
    """What the terms lack, in the norm of the inputs; of a joint, its effect, in the Fisher norm."""
    split = _split(method, site, size)
    if site.joint is not None:
        assert split.effect is not None, f"the split of {site.name} does not say its effect"
        role, change = split.effect
        moments = site.members[role].moments
        return float(weighted_loss(change, moments["input_moment"], moments["output_grad_moment"]))
    target = site.missing(torch.float64) if method.kind == "compensate" else site.weight(torch.float64)
    made = sum((term.dense(torch.float64) for term in split.terms.values()), start=torch.zeros(OUT, IN))
    return float(weighted_loss(target - made, site.moments["input_moment"], torch.eye(OUT)))


def _sizes_have_their_bytes(method: Method) -> None:
    for itemsize, dtype in ((4, torch.float32), (2, torch.bfloat16)):
        for site in _sites(method, dtype):
            sizes = _sizes(method, site, itemsize)
            bytes_of = [nbytes for _, nbytes in sizes]
            assert sizes and bytes_of == sorted(bytes_of), "sizes do not rise in bytes"
            assert len({str(size) for size, _ in sizes}) == len(sizes), "a size stands twice"
            for size, nbytes in (sizes[0], sizes[len(sizes) // 2], sizes[-1]):
                stored = sum(term.nbytes for term in _terms(_split(method, site, size)).values())
                assert stored == nbytes, f"size {size} says {nbytes} bytes, and its terms store {stored}"


def _larger_is_nearer(method: Method) -> None:
    for site in _sites(method):
        sizes = [size for size, _ in _sizes(method, site)]
        errors = [_error(method, site, size) for size in (sizes[0], sizes[len(sizes) // 2], sizes[-1])]
        assert errors == sorted(errors, reverse=True), f"errors {errors}"
        assert len(sizes) == 1 or errors[-1] < errors[0]


def _pure(method: Method) -> None:
    for site, fresh in zip(_sites(method), _sites(method), strict=True):
        size = _sizes(method, site)[0][0]
        before = copy.deepcopy({role: term.state_dict() for role, term in _terms(site).items()})
        torch.manual_seed(1)
        one = _terms(_split(method, site, size))
        torch.manual_seed(2)
        other = _terms(_split(method, fresh, size))
        for role, term in one.items():
            for key, tensor in term.state_dict().items():
                assert torch.equal(tensor, other[role].state_dict()[key]), f"{role}.{key} differs between two runs"
        for role, state in before.items():
            for key, tensor in state.items():
                assert torch.equal(tensor, _terms(site)[role].state_dict()[key]), (
                    f"the layer's {role}.{key} was changed"
                )


def _keeps_dtype(method: Method) -> None:
    for site in _sites(method, torch.bfloat16):
        for term in _terms(_split(method, site, _sizes(method, site, 2)[0][0])).values():
            dense = term.dense()
            assert dense.dtype == torch.bfloat16 and torch.isfinite(dense).all()


def _zeros_are_finite(method: Method) -> None:
    """Half of the outputs and inputs zero, and the whole weight: of a joint, of each of its layers."""
    for site in _sites(method):
        for some in (_blank(method, site, 0.5), _blank(method, site, 1.0)):
            sizes = [size for size, _ in _sizes(method, site)]
            for size in (sizes[0], sizes[-1]):
                for role, term in _terms(_split(method, some, size)).items():
                    assert torch.isfinite(term.dense(torch.float32)).all(), f"{role} of size {size} is not finite"


def _blank(method: Method, site: Site, share: float) -> Site:
    """The layer with a share of its rows zero; of its inputs half as many."""
    if site.joint is not None:
        return replace(site, members={role: _blank(method, member, share) for role, member in site.members.items()})
    rows, columns = int(share * site.shape[0]), int(share * site.shape[1]) // 2

    def blank(W: Tensor) -> Tensor:
        W = W.clone()
        W[:rows] = 0
        return W

    moments = {name: moment.clone() for name, moment in site.moments.items()}
    for name, moment in moments.items():
        if name.startswith("input") or name == "fisher_columns":
            moment[:columns] = 0
        if name == "input_moment":
            moment[:, :columns] = 0
    terms = {role: _base(method, blank(term.dense(torch.float32)).to(site.dtype)) for role, term in site.terms.items()}
    return replace(site, terms=terms, moments=moments, original=None if site.original is None else blank(site.original))


def _nan_is_named(method: Method) -> None:
    model = tiny_llama()
    with torch.no_grad():
        model.get_submodule("model.layers.0.mlp.up_proj").weight[0, 0] = float("nan")  # type: ignore[index, operator]
    try:
        _compress(model, method)
    except WeftError as error:
        assert "model.layers.0.mlp.up_proj" in str(error) or "NaN" in str(error), str(error)
    else:
        raise AssertionError("NaN was taken for a weight")


def _compress(model: nn.Module, method: Method, **given: Any) -> Any:
    chain: list[str | Method] = ["nf2", method] if method.kind == "compensate" else [method]
    budget = {"compress": 0.6, "quantize": None, "compensate": "12 bits"}[method.kind]
    if method.kind == "quantize" and len(_sizes(method, _site(method))) > 1:
        budget = "8 bits"
    return compress(model, chain, budget=budget, batches=task(), **given)


def _within_its_budget(method: Method) -> None:
    model = tiny_llama()
    done = _compress(model, method).allocation
    assert done.spent <= done.allowed <= done.total, f"{done.spent} of {done.allowed} bytes"
    for name, size in done.items():
        layers = [model.get_submodule(layer) for layer in layers_of(name)]
        if size is None:
            assert all(type(layer) is nn.Linear for layer in layers)
            continue
        assert all(isinstance(layer, SumLinear) for layer in layers)
        stored = sum(term.nbytes for layer in layers for term in layer.terms.values())  # type: ignore[union-attr, operator, misc]
        assert stored == done.choices[name].bytes, f"{name} stores {stored} bytes, {done.choices[name].bytes} are said"


def _losses_are_those_of_the_terms(method: Method) -> None:
    if method.kind == "compensate":
        return  # of a chain; its curve is `LowRankSplit`'s
    if method.joints is not None:
        return _effects_are_those_of_the_joints(method)
    model = tiny_llama()
    name = next(iter(linear_layers(model)))
    plan = Plan(method=method, options=method.options({}), layers=(name,), reads=("losses",))
    stats = calibrate(model, task(), plan.needs, layers=name)
    infos = survey(model, plan, offered(model, plan), task(), stats, Store())
    W, moments = weight_of(model.get_submodule(name), torch.float64), stats[name]
    for choice in infos[name].sizes[:: max(len(infos[name].sizes) // 3, 1)]:
        changed = copy.deepcopy(model)
        compress(changed, method, allocate={name: choice.size}, batches=task(), layers=name)
        D = weight_of(changed.get_submodule(name), torch.float64) - W
        loss = float(weighted_loss(D, moments["input_moment"], moments["output_grad_moment"]))
        assert abs(loss - choice.loss) <= 1e-3 * loss + 1e-9, f"size {choice.size}: said {choice.loss}, is {loss}"


def _effects_are_those_of_the_joints(method: Method) -> None:
    """One layer changed by the effect does what all changes of the joint do together."""
    for site in _sites(method):
        assert site.joint is not None
        all_, one = tiny_llama(), tiny_llama()
        size = _sizes(method, site)[len(_sizes(method, site)) // 2][0]
        layers, joints = tuple(linear_layers(all_)), _joints(all_, method)
        sites = Plan(method=method, options={}, layers=layers, joints=joints).sites
        sizes = {name: size if name == site.name else None for name in sites}
        compress(all_, method, allocate=sizes, batches=task())
        role, change = _split(method, site, size).effect  # type: ignore[misc]
        put(
            one,
            site.joint.members[role].layer,
            {"base": Dense.from_matrix(site.members[role].weight() + change.float())},
        )
        assert torch.allclose(_logits(one), _logits(all_), atol=1e-4), f"the effect of {site.name} is another"


@torch.no_grad()
def _logits(model: nn.Module) -> Tensor:
    logits: Tensor = model(input_ids=task()[0]["input_ids"]).logits
    return logits


def _saves(method: Method) -> None:
    model = tiny_llama()
    _compress(model, method)
    with tempfile.TemporaryDirectory() as directory:
        model.save_pretrained(directory)  # type: ignore[operator]
        again = AutoModelForCausalLM.from_pretrained(directory)
        again.train(False)
    assert torch.allclose(_logits(again), _logits(model), atol=1e-6), "the logits are others"


def _resumes(method: Method) -> None:
    straight, halfway, again = tiny_llama(), tiny_llama(), tiny_llama()
    _compress(straight, method)
    with tempfile.TemporaryDirectory() as directory:
        place, put = Path(directory), Store.put

        def stopping(self: Store, name: str, piece: Any) -> None:
            put(self, name, piece)
            raise KeyboardInterrupt

        Store.put = stopping  # type: ignore[method-assign]
        try:
            _compress(halfway, method, progress=place)
        except KeyboardInterrupt:
            pass
        else:
            raise AssertionError("nothing was kept on the way")
        finally:
            Store.put = put  # type: ignore[method-assign]
        _compress(again, method, progress=place)
    for name, tensor in straight.state_dict().items():
        assert torch.equal(tensor, again.state_dict()[name]), f"{name} differs"


def _conv1d(method: Method) -> None:
    model = tiny_gpt2()
    biases = {name: layer.bias.detach().clone() for name, layer in linear_layers(model).items()}  # type: ignore[operator, union-attr]
    done = _compress(model, method).allocation
    sizes = {layer: size for site, size in done.items() for layer in layers_of(site)}
    moved = method.joints is not None or (isinstance(method.split, LowRankSplit) and "input_mean" in method.needs)
    for name, layer in linear_layers(model).items():
        if sizes[name] is not None:
            assert isinstance(layer, SumLinear) and layer.transposed and layer.bias is not None
            assert moved or torch.equal(layer.bias, biases[name]), f"the bias of {name} was changed"
    assert torch.isfinite(_logits(model)).all()


def _options(method: Method) -> None:
    try:
        _compress(tiny_llama(), method, no_such_option=1)
    except WeftError as error:
        assert "no_such_option" in str(error), str(error)
    else:
        raise AssertionError("an unknown option was taken")


PROPERTIES: dict[str, Callable[[Method], None]] = {
    "sizes": _sizes_have_their_bytes,
    "nearer": _larger_is_nearer,
    "pure": _pure,
    "dtype": _keeps_dtype,
    "nan": _nan_is_named,
    "zeros": _zeros_are_finite,
    "budget": _within_its_budget,
    "losses": _losses_are_those_of_the_terms,
    "saves": _saves,
    "resumes": _resumes,
    "conv1d": _conv1d,
    "options": _options,
}
"""Property -> its check; also for parametrised tests."""
