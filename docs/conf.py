"""Settings of Sphinx; `make docs` stages the pages and runs it."""

from brainage_nb import __version__

project = "brainage_nb"
author = "The brainage_nb authors"
version = release = __version__
extensions = [
    "myst_nb",
    "sphinx.ext.autodoc",
    "numpydoc",
]
default_role = "literal"
myst_heading_anchors = 4
nb_execution_mode = "off"  # the demo executed them
nb_output_stderr = "remove"
numpydoc_show_class_members = False
autodoc_typehints = "none"
autodoc_member_order = "bysource"
html_theme = "pydata_sphinx_theme"
html_title = "brainage_nb"
html_static_path = ["style.css"]
html_css_files = ["style.css"]
html_sidebars = {page: [] for page in ("index", "results", "limits", "refused", "faq", "reference")}
html_show_sourcelink = False
html_copy_source = False
html_theme_options = {
    "github_url": "https://github.com/brainage-nb/brainage_nb",
    "navbar_align": "left",
    "header_links_before_dropdown": 9,
    "show_toc_level": 2,
    "navigation_with_keys": False,
    "footer_start": ["copyright"],
    "footer_end": [],
}
copyright = "The brainage_nb authors. Apache-2.0. For research and teaching; not a medical device"
