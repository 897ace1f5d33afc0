"""`slime.train` one step ahead: a rollout is generated while the one before it is trained.

python3 -m slime.train_async FLAGS      the same as python3 -m slime.train --schedule one-step-ahead FLAGS
"""

from __future__ import annotations

import sys

from slime.train import main

if __name__ == "__main__":
    sys.exit(main(["--schedule", "one-step-ahead", *sys.argv[1:]]))
