"""Verbs: what a user does. One file a verb; each holds the Python function on models in memory and `run`, the same on
paths.

`run` checks its arguments before it loads anything, does the work, writes `run.json` beside its output and returns a
JSON-able dict.
"""
