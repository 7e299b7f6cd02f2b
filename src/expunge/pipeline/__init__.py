"""Stages, trainer, evaluation: the only room that knows processes and devices."""
