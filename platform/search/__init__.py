"""Hyper-parameter search: a space, a sampler, a broker that hands out its points, and pruning."""
