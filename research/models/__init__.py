"""Mixers, one file each, and the models made of them."""
