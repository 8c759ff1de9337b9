"""`python -m inheritune_ds` is `inheritune-ds`."""

import sys

from inheritune_ds.cli import main

if __name__ == "__main__":
    sys.exit(main())
