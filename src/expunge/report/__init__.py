"""Tables, SVG figures, HTML, model card; no torch."""
