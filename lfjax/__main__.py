"""`python -m lfjax`: the `lfjax` command."""

import sys

from lfjax.cli import main

sys.exit(main())
