"""`python -m temper` is the `temper` command."""

import sys

from temper.cli import main

sys.exit(main())
