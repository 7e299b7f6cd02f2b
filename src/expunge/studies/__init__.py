"""The published experiments as recipes and figures."""
