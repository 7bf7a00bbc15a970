"""Strategies: ways to decode one round, one module each, named as ``viasd bench --methods`` names them.

Which there are is read from this folder (:data:`viasd_calib.choices.STRATEGIES`), so that a new one is one new module.
"""
