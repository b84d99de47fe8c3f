"""Skeleton encoders: clips [N, C, T, V, M] in, one feature per clip out."""
