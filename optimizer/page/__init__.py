"""One self-contained HTML page of what a run found out.

Importing it brings matplotlib and jinja2: do so only where a page is written.
"""

from edgewise.optimizer.page.render import render, write_page

__all__ = ["render", "write_page"]
