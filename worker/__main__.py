"""`python -m worker` is `llorch-worker`."""

from worker.cli import main

if __name__ == "__main__":
    main()
