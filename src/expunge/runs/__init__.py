"""The run directory: record, atomic stage store, events, provenance, and the catalogue over many runs."""
