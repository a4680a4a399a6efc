"""Serving: what a method takes of a server's memory, and the adapter to the server's engine."""
