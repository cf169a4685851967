"""Sphinx: the page of the API, from the docstrings. `make docs` builds it into build/docs."""

import charrnn_fast

project = "charrnn_fast"
author = "The charrnn_fast developers"
copyright = author
version = release = charrnn_fast.__version__

extensions = [
    "sphinx.ext.autodoc",
    "sphinx.ext.autosummary",
    "sphinx.ext.mathjax",
    "sphinx.ext.napoleon",
    "sphinx.ext.viewcode",
]
nitpicky = True
# Nothing is fetched, so no inventory of torch's pages tells where its names lead.
nitpick_ignore_regex = [("py:.*", r"(torch|numpy|npt|nn|np|collections|pathlib)\b.*")]

add_module_names = False
autodoc_member_order = "bysource"
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
