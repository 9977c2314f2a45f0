"""`python -m d2v_ds`: the same as the command `d2v-ds`."""

import sys

from d2v_ds.cli import main

sys.exit(main())
