"""python -m benchmarks KIND ...: the same as `bwla-compile bench KIND ...`."""

import sys

from bwla_compiler.cli import main

if __name__ == "__main__":
    raise SystemExit(main(["bench", *sys.argv[1:]]))
