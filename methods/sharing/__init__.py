"""The sharing axis: which layer's keys and values each layer reads, and of how many heads."""
