"""What a training run is made of: fingerprints of its rows and of the weights that it does not train, kept beside its
checkpoints, so that a checkpoint is never gone on with on other data or another model.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from pathlib import Path

from torch import nn

from weft.digests import tensors_digest
from weft.errors import WeftError
from weft.files import write_json

__all__ = ["check_identity", "frozen_digest", "weights_digest"]

FILE = "weft_identity.json"


def check_identity(directory: Path, parts: Mapping[str, str], resumed: bool, write: bool) -> None:
    """Compare what a run is made of with what the run in `directory` was made of, and note it there.

    Args:
        parts: what it is in words -> digest.
        resumed: whether a checkpoint there is about to be gone on with.
        write: whether this process writes files.

    Raises WeftError naming what changed.
    """
    file = directory / FILE
    before = json.loads(file.read_text(encoding="utf-8")) if resumed and file.is_file() else {}
    changed = [what for what in parts if before.get(what, parts[what]) != parts[what]]
    if changed:
        raise WeftError(
            f"The checkpoint in {directory} was trained with other inputs: {' and '.join(changed)} changed since; "
            "bring back what was there to go on, or train in a new directory."
        )
    if write:
        write_json(file, parts)


def weights_digest(model: nn.Module) -> str:
    """A digest of the frozen weights, and of the names and shapes of all; what is trained lies in checkpoints."""
    named = sorted(model.named_parameters(remove_duplicate=False))
    layout = str([(name, tuple(p.shape), p.requires_grad) for name, p in named])
    frozen = (p for _, p in named if not p.requires_grad and not p.is_meta)
    return hashlib.blake2b(f"{layout}{tensors_digest(frozen)}".encode(), digest_size=12).hexdigest()


def frozen_digest(model: nn.Module) -> str:
    """The same of a model of which nothing is trained, with its buffers: codes are buffers."""
    buffers = (buffer for _, buffer in sorted(model.named_buffers()) if not buffer.is_meta)
    return weights_digest(model) + tensors_digest(buffers)
