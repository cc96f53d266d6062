"""A real cluster under load while its parts are killed, frozen and poisoned, and a ledger that misses nothing."""
