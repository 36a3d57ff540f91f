"""Traces: what a training did, written down to the bit, and where two of them part."""
