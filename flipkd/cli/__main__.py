"""``python -m flipkd.cli``."""

from flipkd.cli import main

main()
