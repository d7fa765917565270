"""One page that shows what every speed costs and wins; it needs no network and no server."""

from fastkd.report.page import write_page
from fastkd.report.pictures import write_pictures
from fastkd.report.sources import Source, read_source

__all__ = ["Source", "read_source", "write_page", "write_pictures"]
