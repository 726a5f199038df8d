"""Composes and operates: the pipeline, the command line, presets and monitoring."""
