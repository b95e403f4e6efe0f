"""`python -m kdvit`."""

from kdvit.cli import main

if __name__ == "__main__":
    main()
