"""Verifiers larger than memory: q's own layers are read for each of its passes, what q' runs stays in memory."""
