"""Scores, tables and the report page."""
