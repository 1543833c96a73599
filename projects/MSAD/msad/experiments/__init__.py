"""Experiments: training runs that depend on one another, comparisons of their configurations, and the report."""
