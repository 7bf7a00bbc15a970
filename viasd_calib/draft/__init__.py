"""Draft models: what proposes tokens."""
