"""What a run leaves for people: pictures, tables of numbers, and one page that needs no network and no server. Knows
results, not models.
"""

from fastkd.report.page import write_page
from fastkd.report.pictures import write_pictures
from fastkd.report.sources import Source, read_source

__all__ = ["Source", "read_source", "write_page", "write_pictures"]
