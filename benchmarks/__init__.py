"""The same work done the seed's way, the peers' way and ours, in one run: `python -m benchmarks`."""
