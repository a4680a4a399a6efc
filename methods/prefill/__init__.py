"""The prefill axis: how a prompt becomes a cache."""
