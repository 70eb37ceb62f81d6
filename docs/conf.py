"""Sphinx settings. Build: `python -m sphinx -W --keep-going -b html docs docs/_build/html`."""

import os
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
# This checkout's configs/ and experiments/; the extensions live beside this file.
sys.path[:0] = [str(ROOT), str(ROOT / "docs" / "_ext")]
os.environ.setdefault("JAX_PLATFORMS", "cpu")

import rlhf_jax  # noqa: E402

project = "rlhf_jax"
author = "The rlhf_jax authors"
copyright = author
release = version = rlhf_jax.__version__

extensions = [
    "sphinx.ext.autodoc",
    "sphinx.ext.napoleon",
    "sphinx.ext.viewcode",
    "sphinx.ext.mathjax",
    # MathJax is copied into the site: equations need no network.
    "sphinx-mathjax-offline",
    "myst_nb",
    "docstrings",
    "config_tables",
]
exclude_patterns = ["_build", "_ext", "figures/figure_*.md"]

# Docstrings: `name` links where something has this name; see _ext/docstrings.py for the rest.
default_role = "name"
add_module_names = False
add_function_parentheses = False
autodoc_member_order = "bysource"
autodoc_default_options = {"members": True}
autodoc_typehints_format = "short"
autodoc_preserve_defaults = True
python_use_unqualified_type_names = True
python_maximum_signature_line_length = 120
# Dashes only: quotes and [..., T] stay as they are typed.
smartquotes_action = "D"
napoleon_numpy_docstring = False
napoleon_use_rtype = False
napoleon_custom_sections = [
    ("Attributes", "params_style"),
    ("Fields", "params_style"),
    ("Raises (when traced)", "Raises"),
]

# Notebooks are shown with the outputs that they were committed with; tests run them.
nb_execution_mode = "off"
myst_enable_extensions = ["dollarmath", "colon_fence", "deflist"]
myst_heading_anchors = 3

html_theme = "furo"
html_title = "rlhf_jax"
html_static_path = ["_static"]
html_css_files = ["site.css"]
html_show_copyright = False
html_copy_source = False
pygments_style = "friendly"
