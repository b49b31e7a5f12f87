"""What `weft plan` plans: jobs by name, and those of each task where nothing is named."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from weft.errors import WeftError, unknown
from weft.grafts import Graft
from weft.methods import METHODS
from weft.methods.base import Method
from weft.optim import OPTIMIZERS
from weft.records import find
from weft.verbs.quantize import schemes

__all__ = ["DEFAULTS", "Job", "jobs"]

DEFAULTS = {
    "finetune": ("full", "full+galore", "full+apollo", "lora", "nf4+lora", "int8+lora", "dora", "lora-xs"),
    "pretrain": ("adamw", "galore", "apollo", "muon", "low-rank", "sltrain", "cola", "low-rank+galore"),
    "compress": ("svd", "svd-llm", "kfac-svd", "modegpt", "int8", "nf4", "rtn"),
    "serve": ("dense", "int8", "nf4", "nf3", "rtn"),
}
"""What is planned where nothing is named. A name is of one method, or, unless it compresses, of several with + between
them.
"""
_KINDS = {"finetune": ("adapt", "graft", "train", "compress"), "pretrain": ("pretrain",), "serve": ()}


@dataclass(frozen=True)
class Job:
    """What is done, by name: a code of the weights, a method or structure, an optimizer."""

    name: str
    scheme: str | None = None
    method: str | None = None
    optimizer: str | None = None

    @classmethod
    def parse(cls, name: str, task: str) -> Job:
        """Raises WeftError for a name that means nothing in this task."""
        if task == "compress":
            return cls(name, method=find(name, "compress", "quantize").name)
        parts: dict[str, str] = {}
        for part in name.split("+"):
            kind = _kind(part, task)
            if kind in parts:
                raise WeftError(f"{name!r} names two of a kind: {parts[kind]} and {part}; give one of them.")
            parts[kind] = part
        parts.pop("dense", None)
        if task == "finetune" and "method" not in parts:
            parts["method"] = "full" if "scheme" not in parts else "lora"
        return cls(name, **parts)

    @property
    def record(self) -> Method | Graft | None:
        """That of the method."""
        kinds = dict.fromkeys(["compress", "quantize", *(kind for kinds in _KINDS.values() for kind in kinds)])
        return None if self.method is None else find(self.method, *kinds)  # type: ignore[return-value]


def _kind(part: str, task: str) -> str:
    known: dict[str, Mapping[str, Any]] = {
        "scheme": schemes() if task != "pretrain" else {},
        "dense": {"dense": None} if task == "serve" else {},
    }
    known["optimizer"] = OPTIMIZERS if task != "serve" else {}
    for kind, names in known.items():
        if part in names:
            return kind
    if _KINDS[task]:
        return "method" if find(part, *_KINDS[task]) else ""
    raise unknown("form of the weights", part, [*known["scheme"], "dense"])


def jobs(task: str, methods: str | Sequence[str] = ()) -> list[Job]:
    """The jobs of a task: those named, with commas or as a list, or the usual ones; "all" is every method there is.

    Raises WeftError for an unknown task or method.
    """
    if task not in DEFAULTS:
        raise unknown("task to plan", task, DEFAULTS)
    names = [n.strip() for n in (methods.split(",") if isinstance(methods, str) else methods) if n.strip()]
    if methods and not names:
        raise WeftError(f"--methods {methods!r} names nothing: give such as {','.join(DEFAULTS[task][:2])}, or all.")
    if names == ["all"]:
        names = _every(task)
    return [Job.parse(name, task) for name in dict.fromkeys(names or DEFAULTS[task])]


def _every(task: str) -> list[str]:
    kinds = {"finetune": ("adapt", "train"), "compress": ("compress", "quantize"), "pretrain": ("pretrain",)}.get(
        task, ()
    )
    # what trains codes has none to train in a dense model
    more = [name for name, m in METHODS.items() if m.kind in kinds and (m.kind != "train" or m.split is None)]
    return list(dict.fromkeys([*DEFAULTS[task], *more, *(schemes() if task == "serve" else ())]))
