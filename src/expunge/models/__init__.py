"""Load, adapt, save and run models."""
