"""python -m ai3_compile."""

import sys

from .cli import main

sys.exit(main())
