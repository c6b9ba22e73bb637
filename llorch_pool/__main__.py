"""`python -m llorch_pool`."""

from llorch_pool.cli import main

if __name__ == "__main__":
    main()
