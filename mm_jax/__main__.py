"""`python -m mm_jax`."""

import sys

from mm_jax.cli.main import main

if __name__ == "__main__":  # worker processes import this module again
    sys.exit(main())
