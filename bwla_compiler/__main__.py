"""`python -m bwla_compiler` is `bwla-compile`."""

import sys

from bwla_compiler.cli import main

if __name__ == "__main__":
    sys.exit(main())
