"""What scripts/bench and scripts/bench-compare do: run, read, draw, compare. Standard library, and matplotlib to draw."""
