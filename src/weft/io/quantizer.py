"""weft in transformers' quantizer registry: `from_pretrained` builds the sums of terms that a checkpoint lists.

    "quantization_config"   in config.json:
    quant_method, format    "weft", 1
    weft                    the version that wrote it
    method, settings        what made the terms
    layers                  {"model.layers.0.self_attn.q_proj": SumLinear.spec(), ...}
    embeddings              name -> shape and head of tables of tokens in codes, where there are any
    graft                   name, options and seed of a graft (`weft.grafts`), where there is one

Everything that can be wrong with a checkpoint is found in its headers, while the model is still on the meta device.
"""

from __future__ import annotations

import copy
import re
import weakref
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

from torch import nn
from transformers.quantizers.auto import register_quantization_config, register_quantizer
from transformers.quantizers.base import HfQuantizer
from transformers.utils.quantization_config import QuantizationConfigMixin

from weft import __version__
from weft.errors import WeftError
from weft.io.headers import check_tensors, keep_mixed_precision
from weft.records import find
from weft.tensors import own_memory
from weft.terms import Spec, SumLinear, build_sum
from weft.terms.coded_embedding import embedding_specs, rebuild_embeddings
from weft.terms.experts import fuse, open_experts
from weft.terms.layers import is_linear, replace, weight_of
from weft.terms.random_products import share_stores

if TYPE_CHECKING:
    from transformers import PreTrainedModel  # at run time when it is needed: the hook comes before the models

__all__ = [
    "FORMAT",
    "GRAFT",
    "WeftConfig",
    "WeftQuantizer",
    "check_alone",
    "forget_quantizer",
    "mark",
    "marked_as",
    "remark",
    "sum_specs",
    "tied_tensors",
    "unmark",
]

FORMAT = 1
"""The version of the layout; raised when an older weft could not read what this one writes."""
GRAFT = "_weft_graft"
"""The attribute of a model that remembers its graft (`weft.grafts.base.Grafted`)."""


@register_quantization_config("weft")
class WeftConfig(QuantizationConfigMixin):  # type: ignore[misc]
    """What the config.json of a weft model says. Once bound to a model, `layers` lists what the model has when saved.

    Raises:
        WeftError: the checkpoint has another format, or says something that this format does not know.
    """

    def __init__(
        self,
        layers: Mapping[str, Spec] | None = None,
        *,
        method: str | None = None,
        settings: Mapping[str, Any] | None = None,
        tied: Mapping[str, str] | None = None,
        embeddings: Mapping[str, Mapping[str, Any]] | None = None,
        graft: Mapping[str, Any] | None = None,
        format: int = FORMAT,
        weft: str | None = None,
        quant_method: str = "weft",
        **strange: Any,
    ) -> None:
        made_by = f"weft {weft}" if weft else "another version of weft"
        if format != FORMAT or strange:
            what = f"format {format}" if format != FORMAT else f"an entry {min(strange)!r} in its quantization_config"
            raise WeftError(
                f"This checkpoint, written by {made_by}, has {what}, which weft {__version__} (format {FORMAT}) "
                f"does not know; install {made_by}, or have it write the model anew with 'weft merge'."
            )
        self.quant_method: Any = quant_method  # transformers types it as a member of its own enum
        self.format, self.weft = format, weft or __version__
        self.method, self.settings, self.layers = method, dict(settings or {}), dict(layers or {})
        self.tied, self.graft = dict(tied or {}), graft
        self.embeddings: dict[str, Any] = dict(embeddings or {})
        self._model: weakref.ref[nn.Module] | None = None

    def bind(self, model: nn.Module) -> None:
        """From now on, list the layers that `model` has at the time of asking."""
        self._model = weakref.ref(model)

    def to_dict(self) -> dict[str, Any]:
        state = self.__getstate__()
        del state["_model"]
        for name in ("tied", "embeddings", "graft"):
            if not state[name]:
                del state[name]
        return copy.deepcopy(state)

    def __getstate__(self) -> dict[str, Any]:
        model = None if self._model is None else self._model()
        if model is not None:
            self.layers, self.tied = sum_specs(model), tied_tensors(model)
            self.embeddings = dict(embedding_specs(model))
            grafted = getattr(model, GRAFT, None)
            self.graft = None if grafted is None else grafted.json()
        return {**self.__dict__, "_model": None}  # a copy belongs to no model until it is bound


@register_quantizer("weft")
class WeftQuantizer(HfQuantizer):  # type: ignore[misc]
    """Puts the sums of terms in place before weights are loaded; later, the model trains and saves like any."""

    quantization_config: WeftConfig
    requires_calibration = True  # it loads what weft has made; it makes nothing itself
    is_trainable = is_qat_trainable = is_compileable = True

    def is_serializable(self) -> bool:
        return True

    def _process_model_before_weight_loading(
        self, model: PreTrainedModel, checkpoint_files: Iterable[str] | None = None, **_: Any
    ) -> None:
        placed = _resolve(model, self.quantization_config.layers, self.quantization_config.embeddings)
        for name, spec in placed.items():
            _place(model, name, spec)
        said = self.quantization_config.graft
        grafted = [] if said is None else find(said["name"], "graft").rebuild(model, said)  # type: ignore[attr-defined]
        tied = _tied_here(model, self.quantization_config.tied)
        model.all_tied_weights_keys |= tied  # transformers makes them one again, whichever is stored
        coded = rebuild_embeddings(model, self.quantization_config.embeddings)
        if checkpoint_files:
            places = [*placed, *coded, *grafted]
            stored = check_tensors(model, places, list(checkpoint_files), self, tied)
            keep_mixed_precision(model, places, stored)

    def _process_model_after_weight_loading(self, model: PreTrainedModel, **_: Any) -> None:
        own_memory(model)
        share_stores([model])
        forget_quantizer(model)
        _adopt(model, self.quantization_config)
        said = self.quantization_config.graft
        if said is not None:
            find(said["name"], "graft").reconnect(model)  # type: ignore[attr-defined]


def mark(model: PreTrainedModel, method: str | None = None, **settings: Any) -> None:
    """Have the model's config list its sums of terms, follow them when they change, and say what made them.

    `save_pretrained` does so by itself (`weft.io.saving`); a verb calls this for what it wants to say.

    Args:
        method: what made them; None keeps what an earlier mark said.
        settings: more to be told about it, JSON-able, e.g. budget=0.6.
    """
    old = getattr(model.config, "quantization_config", None)
    config = WeftConfig(method=method, settings=settings)
    if method is None and isinstance(old, WeftConfig):
        config.method, config.settings = old.method, {**old.settings, **settings}
    _adopt(model, config)


def unmark(model: PreTrainedModel) -> None:
    """Undo `mark`: the model is saved as a plain one. What another tool has marked stays."""
    for module in _models(model):
        if _marks_of_another(module) is None:
            for name in ("quantization_config", "_is_quantized"):
                if hasattr(module.config, name):
                    delattr(module.config, name)


@contextmanager
def marked_as(model: PreTrainedModel, config: Mapping[str, Any] | None) -> Iterator[None]:
    """Within the block, the model's config has this `quantization_config` (None: none), as another tool's; afterwards
    its own again.
    """
    own = getattr(model.config, "quantization_config", None)
    if own is not None:
        del model.config.quantization_config
    if config is not None:
        model.config.quantization_config = dict(config)
    try:
        yield
    finally:
        if config is not None:
            del model.config.quantization_config
        if isinstance(own, WeftConfig):
            _adopt(model, own)
        elif own is not None:
            model.config.quantization_config = own


def remark(model: nn.Module) -> None:
    """Marks where the model holds sums of terms, coded tables or a graft, none where it holds none; nothing for a
    module that is not transformers', or whose config another tool has marked.
    """
    from transformers import PreTrainedModel

    fuse(model)
    if isinstance(model, PreTrainedModel) and _marks_of_another(model) is None:
        if sum_specs(model) or embedding_specs(model) or getattr(model, GRAFT, None) is not None:
            mark(model)
        else:
            unmark(model)


def check_alone(model: PreTrainedModel) -> None:
    """Raises WeftError where there are sums of terms beside layers that another tool has quantised."""
    sums, theirs = sum_specs(model), _marks_of_another(model)
    if sums and theirs is not None:
        raise WeftError(
            f"This {type(model).__name__} has sums of terms ({next(iter(sums))}) beside layers that are quantised by "
            f"{theirs}, and no directory can hold both; save the adapter alone (weft.save_adapter), or dequantise the "
            "model before weft changes it (model.dequantize())."
        )


def sum_specs(model: nn.Module) -> dict[str, Spec]:
    """name -> spec of every `SumLinear` in the model."""
    return {name: module.spec() for name, module in model.named_modules() if isinstance(module, SumLinear)}


def tied_tensors(model: nn.Module) -> dict[str, str]:
    """The parameters that terms share: name -> the first of its names."""
    first: dict[int, str] = {}
    inside = ((n, p) for n, p in model.named_parameters(remove_duplicate=False) if ".terms." in n)
    homes = {name: first.setdefault(id(parameter), name) for name, parameter in inside}
    return {name: home for name, home in homes.items() if name != home}


def _marks_of_another(model: PreTrainedModel) -> str | None:
    """The tool other than weft that the model's config names as its quantiser."""
    config = getattr(model.config, "quantization_config", None)
    said = config.get("quant_method") if isinstance(config, dict) else getattr(config, "quant_method", None)
    return None if said in (None, "weft") else str(getattr(said, "value", said))


def _models(model: PreTrainedModel) -> list[PreTrainedModel]:
    from transformers import PreTrainedModel

    return [module for module in model.modules() if isinstance(module, PreTrainedModel)]


def _adopt(model: PreTrainedModel, config: WeftConfig) -> None:
    config.bind(model)
    model.config.quantization_config = config
    for module in _models(model):
        # flash attention asks an nn.Linear for its dtype, unless it is told that there may be none
        module.config._is_quantized = True


def forget_quantizer(model: PreTrainedModel) -> None:
    """Undo transformers' marks of frozen integers: they forbid `.float()` and saving a given state dict."""
    for name in ("hf_quantizer", "quantization_method"):
        if hasattr(model, name):
            delattr(model, name)
    model.is_quantized = False  # type: ignore[assignment]
    if _marks_of_another(model) is not None:
        del model.config.quantization_config
        for module in _models(model):
            module.config._is_quantized = False


def _resolve(model: PreTrainedModel, layers: Mapping[str, Spec], beside: Iterable[str]) -> dict[str, Spec]:
    """The layers that this class of model has, by its own names: with or without the base prefix, as the names beside
    tell too.
    """
    prefix = model.base_model_prefix + "."
    listed = {form for name in layers for form in _forms(name, prefix)}
    open_experts(model, lambda name: name in listed)
    present = {name for name, module in model.named_modules() if is_linear(module)}
    found, absent = {}, []
    for name, spec in layers.items():
        match = next((form for form in _forms(name, prefix) if form in present), None)
        if match is None:
            absent.append(name)
        else:
            found[match] = spec
    has_prefix = any(name.startswith(prefix) for name in (*layers, *beside))
    foreign_head = [name for name in absent if has_prefix and not name.startswith(prefix)]
    unused = re.compile("|".join(model._keys_to_ignore_on_load_unexpected or ["(?!)"]))
    wrong = [name for name in absent if name not in foreign_head and not unused.search(name)]
    if wrong:
        raise WeftError(
            f"The checkpoint has a sum of terms at {wrong[0]}, where {type(model).__name__} has no linear layer; "
            "load it as the class that its config.json names."
        )
    return found


def _forms(name: str, prefix: str) -> tuple[str, str, str]:
    return name, name.removeprefix(prefix), prefix + name


def _tied_here(model: PreTrainedModel, tied: Mapping[str, str]) -> dict[str, str]:
    """The pairs of this class of model, by its own names: with or without the base prefix."""
    prefix = model.base_model_prefix + "."
    own = {name for name, _ in model.named_parameters(remove_duplicate=False)}
    found = {}
    for pair in tied.items():
        for names in (pair, [n.removeprefix(prefix) for n in pair], [prefix + n for n in pair]):
            if own.issuperset(names):
                found[names[0]] = names[1]
                break
    return found


def _place(model: PreTrainedModel, name: str, spec: Spec) -> None:
    old = model.get_submodule(name)
    try:
        new = build_sum(spec, device="meta", dtype=old.weight.dtype)  # type: ignore[arg-type, union-attr]
    except WeftError as error:
        raise WeftError(f"The checkpoint's layer {name} cannot be built: {error}") from None
    except (KeyError, TypeError, ValueError, AttributeError, StopIteration, RuntimeError) as error:
        raise WeftError(
            f"The checkpoint's config.json describes the layer {name} wrongly ({error!r}); fetch it again."
        ) from error
    shape = tuple(weight_of(old).shape)
    if (new.out_features, new.in_features) != shape:
        raise WeftError(
            f"The checkpoint's layer {name} is {new.out_features} x {new.in_features}, and the model's is "
            f"{shape[0]} x {shape[1]}; the config.json belongs to another model."
        )
    replace(model, name, new)
