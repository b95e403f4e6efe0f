"""What a user types."""

from kdvit.cli.entry import main

__all__ = ["main"]
