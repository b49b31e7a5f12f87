"""The contract of a graft: a method that changes a model's forward pass rather than a weight.

A graft is built of modules of its own, put at places of the model that were empty, and connected; everything else is
frozen. From this one description follow, for every graft alike:

    put(model, GRAFT, ...)     the modules in their places, trained alone
    remove(model)              the model of before: same parameters, same bytes, trained as before
    aside(model)               without the graft, for a block
    save(model, DIR)           weft_graft.safetensors (tensors by their names in the model) and weft_graft.json
    load(model, DIR)           put and filled

`model.save_pretrained` writes a weft directory, which `from_pretrained` opens with the graft connected, and which plain
transformers refuses: one linear layer is written as a sum of one term.
"""

from __future__ import annotations

import json
import os
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from weft import __version__
from weft.errors import WeftError
from weft.files import write_json
from weft.io.adapter_files import GRAFT_CONFIG
from weft.io.base import Base, base_of, other_weights, sample
from weft.io.checkpoint import Checkpoint
from weft.io.quantizer import GRAFT, remark
from weft.records import Record, find
from weft.runs.output import open_output
from weft.seeds import check_seed
from weft.stats.calibrate import Batch
from weft.terms import SumLinear
from weft.terms.adapters import adapters_of, base_terms, unwrapped
from weft.terms.layers import eligible
from weft.terms.put import is_one_matrix, unput
from weft.terms.put import put as put_terms

__all__ = ["CONFIG", "Graft", "aside", "graft_of", "load", "put", "remove", "save", "write"]

FORMAT = 1
"""The version of the layout; raised when an older weft could not read what this one writes."""
CONFIG, TENSORS = GRAFT_CONFIG, "weft_graft.safetensors"

Modules = Mapping[str, nn.Module]
"""What a graft trains: the place in the model, where nothing was before, -> the module."""


@dataclass(frozen=True, kw_only=True)
class Graft(Record):
    """One graft, as data.

    Args:
        build: (model, seed, **options) -> its modules by place. They are deterministic in the options and the seed, and
            are not in the model yet, of which only the configuration and the shapes may be read. Raises WeftError for a
            model that it does not fit.
        connect: (model, modules) -> what `disconnect` must know: changes the forward pass. The modules are in place.
        disconnect: (model, what `connect` returned): undoes it.
        count: (model, options) -> trained numbers, the paper's formula.
        start: (model, modules, batches) -> None: the start that is read from data; None where no data is looked at.
        begins: what `weft pretrain --method` may begin with, which trains the graft with the whole model, its option
            `whole`: "fresh", weights that are drawn, or "given"; none for a graft of a frozen model.
        fresh: defaults that differ where the model is a fresh one.
        deviates: how the function differs at the start; "" where it does not.
        exempt: property of the conformance suite (`weft.testing_grafts`) -> a sentence saying why the graft does not
            have it.
    """

    kind: str = "graft"
    build: Callable[..., Modules]
    connect: Callable[[Any, Modules], Any]
    disconnect: Callable[[Any, Any], None]
    count: Callable[[Any, Mapping[str, Any]], int]
    start: Callable[[Any, Modules, list[Batch]], None] | None = None
    begins: tuple[str, ...] = ()
    fresh: Mapping[str, Any] = field(default_factory=dict)
    deviates: str = ""
    exempt: Mapping[str, str] = field(default_factory=dict)

    def load(self, model: nn.Module, directory: str | os.PathLike[str]) -> nn.Module:
        """Put a saved one on the model, as `weft.io.adapters` asks for it."""
        return load(model, directory)

    def rebuild(self, model: nn.Module, said: Mapping[str, Any]) -> list[str]:
        """Put the modules of a saved model directory in place, empty; returns their places."""
        modules = self.build(model, said["seed"], **said["options"])
        _place(model, Grafted(self.name, dict(said["options"]), said["seed"], dict(modules)))
        return list(modules)

    def reconnect(self, model: nn.Module) -> None:
        """Connect what `rebuild` put in place, now that its tensors are there; the rest is frozen."""
        grafted = _need(model)
        grafted.opened = next((name for name, module in eligible(model).items() if is_one_matrix(module)), None)
        names = [name for name, _ in model.named_parameters() if not name.startswith(grafted.places())]
        grafted.trained = [name.replace(".terms.base.matrix", ".weight") for name in names]
        _freeze(model, grafted)
        grafted.remembered = self.connect(model, grafted.modules)


@dataclass
class Grafted:
    """A graft on a model, and what must be remembered to take it off again."""

    name: str
    options: dict[str, Any]
    seed: int
    modules: dict[str, nn.Module]
    trained: list[str] | None = None  # names of the parameters that were trained before
    opened: str | None = None  # the layer that was made a sum of one term
    remembered: Any = None  # by `Graft.disconnect`

    @property
    def whole(self) -> bool:
        """Whether the model's own weights are trained along."""
        return bool(self.options.get("whole", False))

    @property
    def graft(self) -> Graft:
        """Its record."""
        found = find(self.name, "graft")
        assert isinstance(found, Graft)
        return found

    def places(self) -> tuple[str, ...]:
        """What the names of its tensors begin with."""
        return tuple(f"{place}." for place in self.modules)

    def tensors(self) -> dict[str, Tensor]:
        """Its tensors by their names in the model."""
        return {f"{at}.{name}": t for at, m in self.modules.items() for name, t in m.state_dict(keep_vars=True).items()}

    def json(self) -> dict[str, Any]:
        """What a model's config.json says of it."""
        return {"name": self.name, "options": self.options, "seed": self.seed}


def graft_of(model: nn.Module) -> Grafted | None:
    """The graft on the model, or None."""
    found: Grafted | None = unwrapped(model).__dict__.get(GRAFT)
    return found


def put(
    model: nn.Module,
    graft: Graft,
    *,
    batches: Iterable[Batch] | None = None,
    seed: int = 0,
    dtype: torch.dtype = torch.float32,
    **options: Any,
) -> nn.Module:
    """Put a graft on the model and freeze everything else; the same model is returned.

    Args:
        batches: data for a start that is read from data; None for the random one.
        seed: of every random number.
        dtype: of the trained tensors.
        **options: the graft's own, see its defaults.

    Raises:
        WeftError: an adapter or a graft is on the model already, the graft does not fit it or has no such option. The
            model is then as it was.
    """
    model = unwrapped(model)
    _check_alone(model, graft)
    chosen = graft.options(options)
    modules = dict(graft.build(model, check_seed(seed), **chosen))
    if graft.start is not None and batches is not None:
        graft.start(model, modules, list(batches))
    grafted = Grafted(graft.name, chosen, seed, {place: _in(module, dtype) for place, module in modules.items()})
    grafted.trained = [name for name, parameter in model.named_parameters() if parameter.requires_grad]
    grafted.opened = _open(model)
    _place(model, grafted)
    _freeze(model, grafted)
    grafted.remembered = graft.connect(model, grafted.modules)
    remark(model)
    return model


def remove(model: nn.Module) -> nn.Module:
    """Take the graft off; the model is what it was. Raises WeftError where there is none."""
    model = unwrapped(model)
    grafted = _need(model)
    grafted.graft.disconnect(model, grafted.remembered)
    for place in grafted.modules:
        owner, _, name = place.rpartition(".")
        delattr(model.get_submodule(owner), name)
    delattr(model, GRAFT)
    if grafted.opened is not None and is_one_matrix(model.get_submodule(grafted.opened)):
        unput(model, grafted.opened)  # else it has been made another sum since
    was_trained = set(grafted.trained or ())
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(name in was_trained)
    remark(model)
    return model


@contextmanager
def aside(model: nn.Module) -> Iterator[None]:
    """The model without its graft, within the block."""
    model = unwrapped(model)
    grafted = _need(model)
    grafted.graft.disconnect(model, grafted.remembered)
    try:
        yield
    finally:
        grafted.remembered = grafted.graft.connect(model, grafted.modules)


def save(model: nn.Module, directory: str | os.PathLike[str]) -> None:
    """Write the graft. Raises WeftError where there is none, or the directory is not empty."""
    grafted = _need(unwrapped(model))
    if grafted.whole:
        raise WeftError(
            f"The model's own weights are trained along with {grafted.name!r} (whole=true), so that more than it "
            "was trained; save the model (model.save_pretrained)."
        )
    with open_output(directory, {}) as place:
        write(model, place.path)


def write(model: nn.Module, directory: Path) -> None:
    """Write the graft's two files into a directory that is there. Raises WeftError where there is none on the model."""
    model = unwrapped(model)
    grafted = _need(model)
    state = {name: tensor.detach().cpu().contiguous() for name, tensor in grafted.tensors().items()}
    save_file(state, directory / TENSORS)
    base = base_of(model, eligible(model))
    write_json(directory / CONFIG, {"format": FORMAT, "weft": __version__, **grafted.json(), "base": base.json()})


def load(model: nn.Module, directory: str | os.PathLike[str]) -> nn.Module:
    """Put a saved graft on the model; the same model is returned.

    On other weights than those that the graft was trained on it loads with a warning.

    Raises:
        WeftError: there is none in the directory, it is damaged, or it belongs to another model. The model is as it
            was.
    """
    model = unwrapped(model)
    said, state = _read(directory)
    graft = find(said["name"], "graft")
    assert isinstance(graft, Graft)
    dtype = next((tensor.dtype for tensor in state.values() if tensor.is_floating_point()), torch.float32)
    put(model, graft, seed=said["seed"], dtype=dtype, **said["options"])
    own = _need(model).tensors()
    wrong = sorted(own.keys() ^ state.keys()) or [name for name in own if own[name].shape != state[name].shape]
    if wrong:
        remove(model)
        raise WeftError(f"The graft in {directory} belongs to another model: {wrong[0]} does not fit this one.")
    with torch.no_grad():
        for name, tensor in own.items():
            tensor.copy_(state[name])
    _warn_of_other_weights(model, said["base"], directory)
    return model


def _read(directory: str | os.PathLike[str]) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """What the directory says, and its tensors."""
    try:
        said = json.loads((Path(directory) / CONFIG).read_text(encoding="utf-8"))
        if said["format"] != FORMAT:
            raise WeftError(f"it has format {said['format']} (of weft {said['weft']}), and this weft reads {FORMAT}")
        said["base"] = Base.from_json(said["base"])
        return {"seed": int(said["seed"]), "options": dict(said["options"]), **said}, dict(Checkpoint(directory))
    except (OSError, ValueError, KeyError, TypeError) as error:
        reason = " ".join(str(error if isinstance(error, WeftError) else repr(error)).split())
        raise WeftError(f"The graft in {directory} cannot be read: {reason}; fetch it again, whole.") from error


def _warn_of_other_weights(model: nn.Module, base: Base, directory: str | os.PathLike[str]) -> None:
    there = [layer for layer in eligible(model) if layer in base.samples]
    changed = other_weights(sample(model, there), base.samples)
    if changed is not None:
        warnings.warn(
            f"The graft in {directory} was made on other weights than this model's (they differ in {changed}); it is "
            "loaded, but what it learned may not fit.",
            stacklevel=3,
        )


def _in(module: nn.Module, dtype: torch.dtype) -> nn.Module:
    """The module in a dtype; one that is there already is not touched, since a plan's tensors cannot be exchanged."""
    there = all(t.dtype == dtype for t in [*module.parameters(), *module.buffers()] if t.is_floating_point())
    return module if there else module.to(dtype)


def _check_alone(model: nn.Module, graft: Graft) -> None:
    there = [other.name for other in (graft_of(model),) if other is not None] or list(adapters_of(model))
    if there:
        raise WeftError(
            f"A graft stands alone, and there is {there[0]!r} on this model already; remove it first "
            f"(weft.remove_adapter), then put {graft.name!r} on."
        )


def _need(model: nn.Module) -> Grafted:
    grafted = graft_of(model)
    if grafted is None:
        raise WeftError("There is no graft on this model; put one on with weft.adapt or weft.load_adapter.")
    return grafted


def _place(model: nn.Module, grafted: Grafted) -> None:
    """Register the modules in the model, and the graft in its book."""
    for place, module in grafted.modules.items():
        owner, _, name = place.rpartition(".")
        model.get_submodule(owner).add_module(name, module)
        module.train(model.training)
    setattr(model, GRAFT, grafted)


def _freeze(model: nn.Module, grafted: Grafted) -> None:
    """Train the graft's parameters alone, or, with `whole`, beside those that are trained."""
    for name, parameter in model.named_parameters():
        mine = name.startswith(grafted.places())
        parameter.requires_grad_(mine or (grafted.whole and parameter.requires_grad))


def _open(model: nn.Module) -> str | None:
    """Make one plain linear layer a sum of one term, of the same memory, and return its name; None where one is."""
    layers = eligible(model)
    if any(isinstance(layer, SumLinear) for layer in layers.values()):
        return None
    name = next(iter(layers))
    put_terms(model, name, base_terms(model, name))
    return name
