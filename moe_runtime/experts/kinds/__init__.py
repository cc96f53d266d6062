"""The built-in kinds of experts."""
