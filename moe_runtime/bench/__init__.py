"""What `moe-runtime bench` runs: six suites, each figure a median beside a peer measured in the same run."""
