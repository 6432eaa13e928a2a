"""Tuning: the tile configs of a layer on one GPU, found by measurement."""
