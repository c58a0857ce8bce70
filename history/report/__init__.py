"""`eigenwatch report`: one HTML file that answers which layers waste their width, and since when.

Read (`reading`), put into words and tables (`page`), and thinned into what the charts need (`payload`). The file holds
all it needs, the plotting library included, and its Content-Security-Policy forbids it to reach for anything else.
"""

from .page import report_html
from .reading import Reading, read_run

__all__ = ["Reading", "read_run", "report_html"]
