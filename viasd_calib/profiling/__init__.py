"""What drafting and verifying cost on the machine at hand, for choosing how to decode."""
