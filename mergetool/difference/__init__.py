"""A difference of two models as factors: which parts, what of it, and the files it is written to."""
