"""The docs as a site: ``sphinx-build -W -n -b html docs docs/_build``. Nothing of it is fetched from elsewhere, neither when it is built nor when it is read."""

from __future__ import annotations

from importlib.metadata import version as installed
from typing import Any

from mergetool.api.functions import explained
from mergetool.options.table import Table

project = "mergetool"
copyright = "the authors of mergetool, MIT"
version = release = installed("mergetool")

extensions = ["myst_parser", "sphinx.ext.autodoc"]
default_role = "code"  # docstrings write names in single backquotes
smartquotes = False  # an empty text is "", and options begin with two hyphens
toc_object_entries = False
autodoc_typehints = "none"  # reference/options.md has what every option takes
myst_enable_extensions = ["colon_fence", "deflist"]
myst_heading_anchors = 4
exclude_patterns = ["_build"]
html_theme = "furo"
html_title = "mergetool"
html_static_path = ["_static"]
html_css_files = ["site.css"]
html_use_index = False
html_copy_source = False
html_show_sourcelink = False


def setup(app: Any) -> None:
    """Docstrings of commands list their options a line each; Sphinx shows them as parameters."""
    app.connect("autodoc-process-docstring", _parameters)


def _parameters(app: Any, what: str, name: str, obj: Any, options: Any, lines: list[str]) -> None:
    if isinstance(obj, type) and issubclass(obj, Table):
        lines += ["", *explained(obj).splitlines()]
    if "Options:" in lines:
        start = lines.index("Options:")
        listed = (line.strip().partition(": ") for line in lines[start + 1 :] if line.strip())
        lines[start:] = [f":param {name}: {text}" for name, _, text in listed]
