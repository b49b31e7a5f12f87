"""Progress and sentences of a verb on stderr: `weft.progress`, which lies below all rooms."""

from __future__ import annotations

from weft.progress import say, track

__all__ = ["say", "track"]
