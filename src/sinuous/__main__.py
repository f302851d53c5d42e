"""`python -m sinuous` is the `sinuous` command."""

import sys

from sinuous.apps.cli import main

sys.exit(main())
