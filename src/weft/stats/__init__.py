"""Calibration: what the data says about each layer, streamed, memory-bounded, cached on disk."""
