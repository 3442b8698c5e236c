"""Losses, recipes and the Trainer."""
