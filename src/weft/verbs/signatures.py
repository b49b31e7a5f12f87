"""Arithmetic on what fine-tunings learned: take the part of one that another has not, add it, scale it, remove it.

    found = weight_signature("robust/", "clean/", start="base/", blocks=8, out="signature/")   # of three checkpoints
    patch(model, found)                          # the clean model gains it; patch(model, found, -1) loses it
    with patched(model, found, 0.5): ...         # for the block alone; the clean weights come back bit for bit

    adapter_signature("robust/", "clean/")       # of two adapters of one base: an adapter, exactly

What it is is in `weft.merging.signatures`. An adapter signature is added by `weft.load_adapter`, scaled and added up by
`weft.combine`, removed by `weft.remove_adapter`.
"""

from __future__ import annotations

import fnmatch
import json
import os
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from weft.errors import WeftError, nearest
from weft.io.adapters import LooseAdapter, read_adapter
from weft.io.checkpoint import Checkpoint
from weft.linalg.svd import widen
from weft.merging.signatures import Code, block_of, decode, encode, factored_orthogonal_part, orthogonal_part
from weft.methods import lora
from weft.runs.output import check_output, open_output
from weft.terms import LowRank, Term
from weft.terms.adapters import Adapter
from weft.verbs.combine import common_base, common_pairs

__all__ = ["Signature", "adapter_signature", "patch", "patched", "read_signature", "weight_signature"]

Source = str | os.PathLike[str] | Mapping[str, Tensor]
"""A checkpoint's directory, or its tensors by name."""
_CONFIG = "weft_signature.json"


@dataclass(frozen=True)
class Signature:
    """A patch for a model's tensors.

    Args:
        codes: by the tensor's name.
        facts: of each, "norm" of the change ||d_c|| and its "cosine" with the clean change: where the change sits.
    """

    codes: Mapping[str, Code]
    facts: Mapping[str, Mapping[str, float]]

    def tensor(self, name: str) -> Tensor:
        """The patch of one tensor, in fp32."""
        return decode(self.codes[name])

    def save(self, directory: str | os.PathLike[str]) -> None:
        """Write weft_signature.safetensors and weft_signature.json. Raises WeftError where something is there."""
        with open_output(directory, {}) as place:
            state = {name: code.codes.contiguous() for name, code in self.codes.items()}
            save_file(state, place.path / "weft_signature.safetensors")
            steps = {name: code.step for name, code in self.codes.items()}
            said = json.dumps({"format": 1, "steps": steps, "facts": dict(self.facts)}, indent=2)
            (place.path / _CONFIG).write_text(said + "\n", encoding="utf-8")


def read_signature(directory: str | os.PathLike[str]) -> Signature:
    """What `Signature.save` wrote. Raises WeftError where there is none, or it is damaged."""
    try:
        said = json.loads((Path(directory) / _CONFIG).read_text(encoding="utf-8"))
        tensors = Checkpoint(directory)
        return Signature({name: Code(tensors[name], step) for name, step in said["steps"].items()}, said["facts"])
    except (OSError, ValueError, KeyError) as error:
        raise WeftError(f"The signature in {directory} cannot be read ({error!r}); fetch it again, whole.") from error


@torch.no_grad()
def weight_signature(
    changed: Source,
    clean: Source,
    start: Source,
    *,
    blocks: int | None = None,
    layers: str | Sequence[str] | None = None,
    bits: int | None = 8,
    out: str | os.PathLike[str] | None = None,
) -> Signature:
    """What the changed weights learned beyond the clean ones, both from one start. One tensor is in memory at a time.

    Args:
        blocks: keep the first so many blocks alone, the published mask; None for everything.
        layers: keep tensors that match a shell pattern alone, such as "*mlp*".
        bits: of the stored numbers, 2 to 8; None for fp32. (bf16 checkpoints have lost small changes already.)
        out: also write it there.

    Raises:
        WeftError: tensors that the three do not share, or of other shapes; a mask that keeps nothing; `out` is not
            empty.
    """
    if out is not None:
        check_output(out, {})
    theirs, ours, base = (s if isinstance(s, Mapping) else Checkpoint(s) for s in (changed, clean, start))
    _check_alike(theirs, ours, base)
    if bits is not None and not 2 <= bits <= 8:
        raise WeftError(f"{bits} bits are not possible; give 2 to 8, or None for fp32.")
    codes: dict[str, Code] = {}
    facts: dict[str, dict[str, float]] = {}
    for name in _kept(base, blocks, layers):
        origin = base[name]
        if not origin.is_floating_point():
            continue
        d_c, d_s = (found[name].double() - origin.double() for found in (theirs, ours))
        codes[name] = encode(orthogonal_part(d_c, d_s), bits)
        scale = float(d_c.norm() * d_s.norm())
        facts[name] = {"norm": float(d_c.norm()), "cosine": float((d_c * d_s).sum()) / scale if scale else 0.0}
    found = Signature(codes, facts)
    if out is not None:
        found.save(out)
    return found


@torch.no_grad()
def patch(model: nn.Module, signature: Signature, weight: float = 1.0) -> nn.Module:
    """Add weight * signature to the model's tensors, in fp32 and cast last; the same model is returned.

    Raises:
        WeftError: the model lacks a tensor of the signature, or has it in another shape. The model is then as it was.
    """
    state = model.state_dict()
    for name, code in signature.codes.items():
        if name not in state or state[name].shape != code.codes.shape:
            raise WeftError(
                f"The signature patches {name} of shape {tuple(code.codes.shape)}, which this {type(model).__name__} "
                f"lacks (nearest: {', '.join(nearest(name, state))}); patch the model that it was made for."
            )
    for name in signature.codes:
        state[name].copy_(widen(state[name]) + weight * signature.tensor(name).to(state[name].device))
    return model


@contextmanager
def patched(model: nn.Module, signature: Signature, weight: float = 1.0) -> Iterator[nn.Module]:
    """The patched model within the block; afterwards the tensors of before, bit for bit."""
    state = model.state_dict()
    before = {name: state[name].clone() for name in signature.codes if name in state}
    try:
        yield patch(model, signature, weight)
    finally:
        with torch.no_grad():
            for name, tensor in before.items():
                state[name].copy_(tensor)


@torch.no_grad()
def adapter_signature(
    changed: str | os.PathLike[str], clean: str | os.PathLike[str], *, blocks: int | None = None
) -> LooseAdapter:
    """What the changed adapter learned beyond the clean one, on the layers of the changed one.

    Args:
        blocks: as in `weight_signature`.

    Raises:
        WeftError: as `weft.combine` does; or no layer lies in these blocks.
    """
    paths = (changed, clean)
    loose = [read_adapter(path) for path in paths]
    base = common_base(paths, loose)
    pairs = common_pairs(paths, loose, [1.0, 1.0])
    terms: dict[str, dict[str, Term]] = {}
    for layer in _kept(loose[0].adapter.terms, blocks, None):
        B, A = factored_orthogonal_part(*pairs[layer])
        terms[layer] = {"signature": LowRank.from_factors(B.float(), A.float())}
    made = LooseAdapter(Adapter("signature", lora.METHOD.name, terms), base)
    made.adapter.settings["rank"] = made.rank
    return made


def _check_alike(changed: Mapping[str, Tensor], clean: Mapping[str, Tensor], start: Mapping[str, Tensor]) -> None:
    for what, other in (("changed", changed), ("clean", clean)):
        strange = sorted(start.keys() ^ other.keys())
        strange += [name for name in start.keys() & other.keys() if start[name].shape != other[name].shape]
        if strange:
            raise WeftError(
                f"The {what} checkpoint and the start differ in the tensor {strange[0]}: only fine-tunings of one "
                "model have a signature."
            )


def _kept(names: Mapping[str, object], blocks: int | None, layers: str | Sequence[str] | None) -> list[str]:
    """The names that the masks keep."""
    patterns = [layers] if isinstance(layers, str) else list(layers or ["*"])
    kept = [name for name in names if any(fnmatch.fnmatchcase(name, pattern) for pattern in patterns)]
    if blocks is not None:
        kept = [name for name in kept if (number := block_of(name)) is not None and number < blocks]
    if not kept:
        raise WeftError(f"No tensor is left by blocks={blocks} and layers={layers}; keep more.")
    return kept
