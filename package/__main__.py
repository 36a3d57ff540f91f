"""`python -m crosstrain`: the command `crosstrain`, where its script is not on the path."""

import sys

from crosstrain.ci.cli import main

if __name__ == "__main__":
    sys.exit(main())
