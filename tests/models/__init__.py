"""Tests of research/models."""
