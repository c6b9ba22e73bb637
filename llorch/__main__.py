"""`python -m llorch`."""

import os
import sys

try:
    from llorch.cli import main
except KeyboardInterrupt:
    os._exit(130)

if __name__ == "__main__":
    sys.exit(main())
