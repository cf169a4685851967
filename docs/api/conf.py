"""Sphinx: the page of the API, from the docstrings. `make docs` builds it into build/docs."""

from dataclasses import fields

import charrnn_fast
from charrnn_fast.charlm import TrainOptions

project = "charrnn_fast"
author = "The charrnn_fast developers"
copyright = author
version = release = charrnn_fast.__version__

extensions = [
    "sphinx.ext.autodoc",
    "sphinx.ext.autosummary",
    "sphinx.ext.napoleon",
    "sphinx.ext.viewcode",
]
nitpicky = True
# Nothing is fetched, so no inventory of torch's pages tells where its names lead.
nitpick_ignore_regex = [("py:.*", r"(torch|numpy|npt|nn|np|collections|pathlib)\b.*")]

add_module_names = False
autodoc_member_order = "bysource"
autodoc_preserve_defaults = True
autodoc_typehints = "none"  # the docstrings have shapes and dtypes, which types do not
autosummary_generate = False
napoleon_google_docstring = True
napoleon_numpy_docstring = False
napoleon_use_rtype = False
napoleon_use_ivar = True

html_theme = "furo"
html_title = f"charrnn_fast {version}"
html_show_sphinx = False
html_copy_source = False


def add_options(app, what, name, obj, options, lines):
    """TrainOptions' fields explain themselves on the command line; here they are its parameters."""
    if obj is TrainOptions:
        place = next(i for i, line in enumerate(lines) if line.startswith(":raises"))
        lines[place:place] = [f":param {f.name}: {f.metadata['help']}" for f in fields(obj)] + [""]


def setup(app):
    app.connect("autodoc-process-docstring", add_options)
