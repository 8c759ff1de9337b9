"""`python -m inheritune_ds` is `inheritune-ds`."""

import sys

if __name__ == "__main__":
    try:
        from inheritune_ds.cli import main
    except KeyboardInterrupt:
        sys.exit(130)
    sys.exit(main())
