"""Runs: what every verb needs around its work: reading models, a place to write, progress, the record, reports."""
