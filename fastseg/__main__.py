"""``python -m fastseg``."""

import sys

from fastseg.cli import main

if __name__ == "__main__":
    sys.exit(main())
