"""Hugging Face models whose experts live in actors."""
