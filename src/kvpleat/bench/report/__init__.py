"""The report: one HTML page, and its tables as markdown, from files of `kvpleat eval` and `kvpleat bench`."""

from kvpleat.bench.report.page import markdown, page, tables
from kvpleat.bench.report.results import Results, merge, read

__all__ = ["Results", "markdown", "merge", "page", "read", "tables"]
