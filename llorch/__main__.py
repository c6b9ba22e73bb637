"""`python -m llorch`."""

import sys

from llorch.cli import main

if __name__ == "__main__":
    sys.exit(main())
