"""Reporting: figures and one self-contained HTML page about a model, its evaluation and its runs."""
