"""Counts and measurements of what sparkme computes; their results are in results/."""
