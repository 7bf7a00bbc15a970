"""Draft traces: what p and q said at every position of q's own texts."""
