"""A comparison as one page of HTML that needs no network."""

from mosaic_core.bench.report._page import check, to_html

__all__ = ["check", "to_html"]
