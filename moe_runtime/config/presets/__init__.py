"""The systems of the literature by name: each a part of a layer's configuration, and where it comes from."""
