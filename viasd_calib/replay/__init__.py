"""Texts that q wrote, read again by p, q' and q in one pass each, as decoding would have it."""
