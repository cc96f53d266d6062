"""The runtime's experts inside other libraries' models."""
