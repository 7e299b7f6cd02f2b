"""Remove chosen content from a language model, and measure whether it is gone."""

__version__ = "0.1.0"
