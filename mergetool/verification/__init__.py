"""Check results: weights against the recipe, pictures against those of the parents.

weights   finite, protected bytes equal, sampled tensors derived again, norms against the parents
images    measurements of a picture, and verdicts from them
report    one self-contained HTML page
"""
