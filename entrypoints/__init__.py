"""One thin script per MLproject entry: read parameters, call aliprod, hand results to tracking."""
