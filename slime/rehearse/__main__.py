"""python3 -m slime.rehearse: see slime.rehearse.command."""

import sys

from slime.rehearse.command import main

if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
