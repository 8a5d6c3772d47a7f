"""Runs the float model on samples and yields numbers: samples, sketches, tables, plans. Edits no model."""
