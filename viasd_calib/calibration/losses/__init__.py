"""Certificate losses: what a certificate bounds, one module each, named as ``viasd calibrate --loss`` names them.

Which there are is read from this folder (:data:`viasd_calib.choices.CERTIFICATE_LOSSES`), so that a new one is one new
module.
"""
