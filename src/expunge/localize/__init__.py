"""One file per attribution method; masks."""
