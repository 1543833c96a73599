"""The report of a study: table, honest summary, pictures, and how to reproduce it."""

from .tables import format_table, markdown_table
from .write import write_report

__all__ = ["format_table", "markdown_table", "write_report"]
