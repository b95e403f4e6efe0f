"""What kdvit costs beside plain transcriptions of the same work: `make bench`. Nothing here is a test."""
