"""`python -m llorch`."""

from llorch.cli import main

if __name__ == "__main__":
    main()
