"""Data sets as they come: labels, rows, pictures."""
