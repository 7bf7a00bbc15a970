"""The slim verifier: a route through the full verifier's own layers, on the full verifier's own cache."""
