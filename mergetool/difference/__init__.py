"""A difference of two models as factors: its parts, its ranks and its files."""
