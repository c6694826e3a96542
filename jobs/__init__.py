"""Verbs that end: prepare, train, evaluate, quantize, register, promote, and `run`, which walks them all."""
