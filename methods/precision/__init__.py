"""The precision axis: how keys and values are stored."""
