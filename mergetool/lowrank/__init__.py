"""The mathematics of one matrix: strongest directions, factors, how many to keep. It knows no model and no file."""
