"""A replication of arXiv:2511.15572 on small images, with seeds and intervals: `make replication`."""
