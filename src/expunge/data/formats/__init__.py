"""One file per data format: sniff a row, read it as an Example."""
