"""The runtime inside other libraries: their models, with the experts in actors."""
