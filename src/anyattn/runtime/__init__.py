"""Choosing a backend for a problem, and running it."""
