"""Cards, the Hub, exports, bridges and explained data sets."""
