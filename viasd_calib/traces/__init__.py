"""Draft traces: what p and q said at every position of texts that q, or a policy in its place, wrote."""
