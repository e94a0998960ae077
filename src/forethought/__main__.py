"""`python -m forethought`, where the command itself is not installed."""

import sys

from forethought.cli import main

if __name__ == "__main__":
    sys.exit(main())
