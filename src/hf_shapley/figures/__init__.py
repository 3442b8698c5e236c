"""Figures of attribution maps, with matplotlib, which is imported when one is drawn."""
