"""How Sphinx builds the site: ``make docs``. CONTRIBUTING.md says why these tools."""

from __future__ import annotations

import os
import sys
from pathlib import Path

HERE = Path(__file__).parent
ROOT = HERE.parent
sys.path[:0] = [str(ROOT), str(ROOT / "conformance" / "src"), str(HERE / "_ext")]
# The API pages import every backend; the Keras pages are those of Keras on TensorFlow.
os.environ["KERAS_BACKEND"] = "tensorflow"
os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")

from flix import __version__  # noqa: E402

project = "flix"
author = "the authors of flix"
copyright = "the authors of flix, Apache-2.0"
version = release = __version__

extensions = [
    "myst_nb",
    "sphinx.ext.autodoc",
    "sphinx.ext.napoleon",
    "sphinx_copybutton",
    "mathml",
    "tidy",
]
exclude_patterns = ["_build", "_ext", "_static", "images"]
source_suffix = {".md": "myst-nb", ".ipynb": "myst-nb"}

# Anchors are GitHub's, so that a link works there and here.
myst_heading_anchors = 4
myst_enable_extensions = ["colon_fence", "deflist", "dollarmath", "attrs_inline"]
myst_dmath_double_inline = True
# Notebooks are run by tests/site/notebooks.py, which keeps their outputs; the build shows those.
nb_execution_mode = "off"
nb_merge_streams = True

autodoc_default_options = {"members": True, "show-inheritance": False}
autodoc_member_order = "groupwise"
autodoc_typehints_format = "short"
autodoc_inherit_docstrings = True
napoleon_numpy_docstring = False
napoleon_use_ivar = True
python_maximum_signature_line_length = 88
toc_object_entries_show_parents = "hide"
add_module_names = False

copybutton_exclude = ".linenos, .gp, .go"
copybutton_prompt_text = r">>> |\$ "
copybutton_prompt_is_regexp = True

html_theme = "furo"
html_title = f"flix {version}"
html_static_path = ["_static"]
html_css_files = ["site.css"]
html_show_sphinx = False
html_copy_source = False
html_theme_options = {"navigation_with_keys": True}
suppress_warnings: list[str] = []
