"""The parts of a route, one file each: what q' does otherwise than q."""
