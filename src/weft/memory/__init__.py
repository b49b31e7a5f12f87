"""Memory savers: of training, where what is cheap to make again is not kept, and the logits are never all there at
once; and of inference (`streamed`), in pieces.
"""

from __future__ import annotations

from weft.memory.cross_entropy import linear_cross_entropy
from weft.memory.lean import LeanReport, lean, lean_report, unlean
from weft.memory.measure import saved_bytes
from weft.memory.streaming import SAVER, Saver, streamed
from weft.records import Table

__all__ = [
    "SAVERS", "LeanReport", "Saver", "lean", "lean_report", "linear_cross_entropy", "saved_bytes", "streamed", "unlean",
]  # fmt: skip

SAVERS = Table(Saver, [SAVER])
