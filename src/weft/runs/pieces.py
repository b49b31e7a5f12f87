"""Finished pieces of a long work: tensors and what describes them, in memory or as safetensors files under a key.

An interrupted run goes on from its pieces to the same bits. Their names carry a key of all that decides them, so that
no other run takes them for its own.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from safetensors import SafetensorError
from safetensors.torch import save_file
from torch import Tensor, nn

from weft.files import replacing
from weft.signals import finishing
from weft.tensors import read_metadata, read_tensors
from weft.terms import Term, build

__all__ = ["Piece", "Store", "named", "packed", "unpacked"]


@dataclass
class Piece:
    """Tensors by name, and JSON-able words about them."""

    tensors: dict[str, Tensor] = field(default_factory=dict)
    words: dict[str, Any] = field(default_factory=dict)

    def add(self, other: Piece) -> None:
        """Take in what another piece holds."""
        self.tensors |= other.tensors
        self.words |= other.words


@dataclass
class Store:
    """Finished pieces by name: in memory, or as safetensors files in a directory, under a key."""

    directory: Path | None = None
    key: str = ""
    memory: dict[str, Piece] = field(default_factory=dict)

    def get(self, name: str) -> Piece | None:
        """The piece, or None when it is not finished."""
        if self.directory is None:
            return self.memory.get(name)
        try:
            words = json.loads(read_metadata(self._path(name)).get("words", "{}"))
            return Piece(read_tensors(self._path(name)), words)
        except (FileNotFoundError, SafetensorError, ValueError):
            return None

    def put(self, name: str, piece: Piece) -> None:
        """Keep a finished piece."""
        if self.directory is None:
            self.memory[name] = piece
            return
        tensors, met = dict[str, Tensor](), set[int]()
        for key, t in ((key, t.detach().cpu().contiguous()) for key, t in piece.tensors.items()):
            tensors[key] = t.clone() if t.data_ptr() in met else t  # a file holds every tensor apart
            met.add(t.data_ptr())
        with replacing(self._path(name)) as beside:
            save_file(tensors, beside, metadata={"words": json.dumps(piece.words)})

    def once(self, name: str, make: Callable[[], Mapping[str, Tensor]]) -> dict[str, Tensor]:
        """The tensors of the piece; where it is not finished they are made, and kept."""
        piece = self.get(name)
        if piece is None:
            with finishing():
                piece = Piece(dict(make()))
                self.put(name, piece)
        return piece.tensors

    def _path(self, name: str) -> Path:
        assert self.directory is not None
        return self.directory / f"{name}-{self.key}.safetensors"


def named(what: str, *words: Any) -> str:
    """The name of a piece that these JSON-able words decide."""
    return f"{what}-{hashlib.sha256(json.dumps(words, sort_keys=True).encode()).hexdigest()[:16]}"


def packed(name: str, terms: Mapping[str, Term], bias: Tensor | None) -> Piece:
    """A layer's terms as a piece: their specs and states, and the bias."""
    state = {f"{name}:{role}:{key}": t for role, term in terms.items() for key, t in term.state_dict().items()}
    if bias is not None:
        state[f"{name}:bias"] = bias
    return Piece(state, {name: {role: term.spec() for role, term in terms.items()}})


def unpacked(piece: Piece, name: str, like: nn.Module) -> tuple[dict[str, Term], Tensor | None]:
    """The terms and the bias that `packed` keeps of a layer, on the device and in the dtype of `like.weight`."""
    device = like.weight.device
    terms = {}
    for role, spec in piece.words[name].items():
        prefix = f"{name}:{role}:"
        own = ((key.removeprefix(prefix), t) for key, t in piece.tensors.items() if key.startswith(prefix))
        state = {key: t.to(device) for key, t in own}  # type: ignore[arg-type]
        terms[role] = build(spec, device="meta")
        terms[role].load_state_dict(state, assign=True)
    return terms, piece.tensors.get(f"{name}:bias")
