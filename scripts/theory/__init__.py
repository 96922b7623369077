"""What ``scripts/feddle_theory.py`` looks at, and how; see docs/theory.md."""
