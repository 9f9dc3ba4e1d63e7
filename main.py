"""Compose, check and launch a list of stages: `python3 main.py stages=[...] key=value ...`."""

import sys

from launcher_scripts.main import main

if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
