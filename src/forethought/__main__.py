"""`python -m forethought`, which launchers such as torchrun start: the command line."""

import sys

from forethought.cli import main

if __name__ == "__main__":
    sys.exit(main())
