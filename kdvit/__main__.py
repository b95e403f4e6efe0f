"""The command `kdvit`, and `python -m kdvit`."""

import sys

from kdvit.runtime.signals import REQUESTS, REQUEUE

if sys.argv[1:2] in (["fit"], ["cache"]):
    REQUESTS.listen(*REQUEUE)  # before the imports, which take seconds

from kdvit.cli import main

if __name__ == "__main__":
    main()
