"""Measuring decoders side by side, and showing what was measured."""
