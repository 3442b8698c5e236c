"""Losses, their arguments and the Trainer."""
