"""How the site is built: ``make docs``."""

project = "lc3"
author = "the lc3 authors"
extensions = [
    "myst_parser",
    "sphinx.ext.autodoc",
    "sphinx.ext.napoleon",
]
myst_enable_extensions = ["deflist"]
myst_heading_anchors = 3
html_theme = "furo"
html_title = "lc3"
copyright = "the lc3 authors"  # noqa: A001  # Sphinx's name
exclude_patterns = ["_build"]
autodoc_typehints = "signature"
# The API page shows the adapters without their frameworks.
autodoc_mock_imports = ["accelerate", "horovod", "lightning", "torchft", "transformers"]
autodoc_member_order = "bysource"
suppress_warnings = ["myst.header", "myst.xref_missing"]
linkcheck_timeout = 20
