"""Gates fitted on traces, and the certificate computed on-policy."""
