"""Is a result right? Its weights against its recipe, and its pictures against those of its parents.

weights   finite, protected bytes equal, sampled tensors derived again, norms against the parents
images    what a picture measures, and the verdicts from it
report    one self-contained HTML page
"""
