"""Data for training, calibration and evaluation: the door to this room's reading, packing and windowing."""

from __future__ import annotations

from weft.train.windows import batches, calibration_batches, evaluation_windows, token_stream, token_windows

__all__ = ["batches", "calibration_batches", "evaluation_windows", "token_stream", "token_windows"]
