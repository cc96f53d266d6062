"""The slow oracle: what the fast path must compute, one token, one assignment and one number at a time."""
