"""Policies, one family per module: router logits become assignments."""
