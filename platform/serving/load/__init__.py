"""Load for a server: requests whose times are fixed beforehand, and a client that keeps them."""
