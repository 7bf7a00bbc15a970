"""Checks and measurements for a machine with a GPU: ``make gpu`` runs them (docs/guide/gpu.md)."""
