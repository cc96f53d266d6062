"""What `moe-runtime bench` runs: seven suites, each figure a median beside a peer measured in the same run."""
