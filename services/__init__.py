"""Nouns that stay up: the teacher service and the endpoint. Imports `cluster` only."""
