"""Hybrid data learning: clients with private data and a server with a little of its own."""

__version__ = "0.1.0"
