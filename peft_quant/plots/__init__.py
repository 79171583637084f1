"""Heat maps of layers."""
