"""Draft traces: statistics of p and q at every position of texts that q, or a policy in its place, wrote."""
