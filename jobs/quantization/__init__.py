"""Quantisation schemes, one file each: how a float student becomes an artefact, and how the artefact is scored."""
