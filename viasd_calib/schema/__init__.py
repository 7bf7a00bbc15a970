"""The parts of a routing spec, each with its own checks; :mod:`viasd_calib.spec` puts them together."""
