"""Quantization formats and the damage they do."""
