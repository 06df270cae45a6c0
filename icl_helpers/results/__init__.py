"""Statistics, tables, figures and the viewer, from results; nothing here runs a model's tasks."""
