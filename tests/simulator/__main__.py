"""`python -m tests.simulator SEED`."""

from tests.simulator.command import main

main()
