"""Memory savers for training: what is cheap to make again is not kept, and the logits are never all there at once."""

from __future__ import annotations

from weft.memory.cross_entropy import linear_cross_entropy
from weft.memory.lean import LeanReport, lean, lean_report, unlean
from weft.memory.measure import saved_bytes

__all__ = ["LeanReport", "lean", "lean_report", "linear_cross_entropy", "saved_bytes", "unlean"]
