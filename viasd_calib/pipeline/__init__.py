"""The jobs, each a function of typed options that returns its result; the command line parses and prints."""
