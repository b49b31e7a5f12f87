"""Rules: what happens around each training step. `base.py` is the contract; every other file is one rule."""

from __future__ import annotations

from weft.rules.base import Rule, Rules, State, make_rules

__all__ = ["Rule", "Rules", "State", "make_rules"]
