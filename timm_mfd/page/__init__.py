"""One page to look at: `report.html` of an analysis, which needs no network and no other file."""

from .page import write_page as write_page
