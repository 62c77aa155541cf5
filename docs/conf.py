"""Sphinx configuration."""

from __future__ import annotations

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent / "_ext"))

from support_matrix import support_matrix

import tokendyn

project = "tokendyn"
author = "The tokendyn authors"
project_copyright = "The tokendyn authors"
release = version = tokendyn.__version__

extensions = ["myst_parser", "sphinx.ext.autodoc", "sphinx.ext.napoleon", "sphinx.ext.viewcode", "mathml"]
myst_enable_extensions = ["dollarmath", "colon_fence"]
myst_heading_anchors = 3
source_suffix = {".md": "markdown"}
exclude_patterns = ["_build", "_ext", "_extra", "_measured", "dynamics/_measured"]
html_theme = "furo"
# Names of the reference, 3.7 to 1 on the highlight of a link's target in furo's own red.
html_theme_options = {"dark_css_variables": {"color-problematic": "#ff7b7b"}}
html_math_renderer = "mathml"
html_title = "tokendyn"
html_static_path = ["_static"]
html_css_files = ["site.css"]
html_extra_path = ["_extra"]  # the interactive page
linkcheck_timeout = 20
linkcheck_retries = 2
linkcheck_report_timeouts_as_broken = False  # OpenReview answers slowly, or asks for a browser
linkcheck_allowed_redirects = {r"https://flax\.readthedocs\.io.*": r"https://flax\.readthedocs\.io/.*"}
autodoc_member_order = "bysource"
autodoc_typehints = "none"
napoleon_google_docstring = True
napoleon_numpy_docstring = False
napoleon_use_param = False  # else "a, b: as in ..." is said once for each
napoleon_custom_sections = ["Cost", "Source"]
nitpicky = True
# Docstrings say what is raised and returned in words, which Sphinx takes for names; tokendyn.diagnose is a module that
# can be called.
nitpick_ignore_regex = [
    ("py:(exc|class)", r"(?!tokendyn\.).*"),
    ("py:.*", r"(torch|jax|numpy|transformers)\..*"),
    ("py:func", r"tokendyn\.diagnose"),
    ("py:.*", r"tokendyn\.torch\.models\..*"),  # most are on the page as tokendyn.torch.NAME
]

(Path(__file__).parent / "_build").mkdir(exist_ok=True)
(Path(__file__).parent / "_build" / "support_matrix.md").write_text(support_matrix() + "\n", encoding="utf-8")
