"""The docs as a site: ``sphinx-build -W -n -b html docs docs/_build``. Nothing of it is fetched from elsewhere, neither when it is built nor when it is read."""

from __future__ import annotations

from importlib.metadata import version as installed

project = "mergetool"
copyright = "the authors of mergetool, MIT"
version = release = installed("mergetool")

extensions = ["myst_parser", "sphinx.ext.autodoc"]
myst_enable_extensions = ["colon_fence", "deflist"]
myst_heading_anchors = 4
exclude_patterns = ["_build"]
html_theme = "furo"
html_title = "mergetool"
html_copy_source = False
html_show_sourcelink = False
