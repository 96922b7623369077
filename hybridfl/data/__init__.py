"""Data sets, who owns which examples of them, and what the server owns; one idea a file, numpy only."""
