"""Shapley values of any game, and how faithful attributions are."""
