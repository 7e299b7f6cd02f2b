"""One file per attack: a variant in, attacked variants out."""
