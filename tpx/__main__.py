"""`python -m tpx`, for a source tree that is not installed."""

import sys

from .cli.main import main

if __name__ == "__main__":
    sys.exit(main())
