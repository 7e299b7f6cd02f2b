"""One file per merge method; streaming reader and writer."""
