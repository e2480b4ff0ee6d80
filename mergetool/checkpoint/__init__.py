"""Files as named tensors, and outputs that appear whole or not at all."""
