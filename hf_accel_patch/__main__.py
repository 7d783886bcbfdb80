"""`python -m hf_accel_patch`."""

import sys

from hf_accel_patch.cli import main

if __name__ == "__main__":
    sys.exit(main())
