"""Sphinx: Markdown pages by MyST, the reference from docstrings."""

from __future__ import annotations

import importlib.metadata
import logging
from typing import Any

from sphinx.application import Sphinx

from sagalog.models import JsonText, Moment

logging.getLogger("alembic").setLevel(logging.WARNING)  # it tells Sphinx of its plugins

project = "sagalog"
version = release = importlib.metadata.version("sagalog")

extensions = ["myst_parser", "sphinx.ext.autodoc", "sphinx.ext.napoleon"]
myst_enable_extensions = ["colon_fence"]
myst_heading_anchors = 3
exclude_patterns = ["_build"]

html_theme = "furo"
html_title = f"sagalog {version}"

# `name` in a docstring is code.
default_role = "code"
autodoc_typehints = "signature"
autodoc_member_order = "bysource"
autodoc_class_signature = "mixed"
napoleon_google_docstring = True
napoleon_numpy_docstring = False


OWN_TYPES: dict[type, str] = {Moment: "datetime", JsonText: "a JSON value"}


def list_columns(app: Sphinx, what: str, name: str, obj: Any, options: Any, lines: list[str]) -> None:
    """A mapped class is documented by its columns."""
    table = getattr(obj, "__table__", None)
    if what != "class" or table is None:
        return
    lines += ["", f".. list-table:: Table `{table.name}`", "   :header-rows: 1", ""]
    lines += ["   * - attribute", "     - column", "     - Python type", "     - may be NULL"]
    for attribute in obj.__mapper__.column_attrs:
        column = attribute.columns[0]
        kind = OWN_TYPES.get(type(column.type)) or column.type.python_type.__name__
        null = "yes" if column.nullable else "no"
        lines += [f"   * - `{attribute.key}`", f"     - `{column.name}`", f"     - {kind}", f"     - {null}"]


def setup(app: Sphinx) -> None:
    """Called by Sphinx."""
    app.connect("autodoc-process-docstring", list_columns)
