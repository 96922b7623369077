"""For the process that others are forked from: they find imported and read what every run needs."""

from cli_helpers import TINY, call

# Nothing is trained, as threads and their locks would not be forked.
call("train", "--dry-run", *TINY, "device=cpu")
