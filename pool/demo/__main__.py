"""`python -m pool.demo`: the demonstration. What it shows is in `pool.demo.demo`."""

import sys

from pool.demo.demo import main

sys.exit(main())
