"""`python -m minigpt`."""

import sys

from minigpt.cli.app import main

if __name__ == "__main__":
    sys.exit(main())
