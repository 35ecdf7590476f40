"""Benchmarks of the attention core: the cases and their rivals, the measurement, and the report."""
