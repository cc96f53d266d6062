"""Metrics for Prometheus: what a router counts, as text on a port of its own."""
