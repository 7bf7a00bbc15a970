"""Router training and calibration for three-tier speculative decoding (VIA-SD).

>>> import viasd_calib
>>> viasd_calib.__version__
'0.1.0'
"""

__version__ = "0.1.0"
