"""Truncated decompositions of one matrix: which directions hold its energy, found by products with it."""
