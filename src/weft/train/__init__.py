"""The glue to transformers' Trainer: reading and packing data, rules as one callback, checkpoints that resume bit for
bit.
"""
