"""python3 -m slime.preflight: see slime.preflight.command."""

import sys

from slime.preflight.command import main

if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
