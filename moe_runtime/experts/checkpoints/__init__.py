"""Experts of Hugging Face checkpoints: what a host reads of them, and how one expert becomes a module of its own."""
