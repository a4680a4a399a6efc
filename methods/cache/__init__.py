"""Where a decoder's past is kept: the interface every cache obeys, and the storages."""
