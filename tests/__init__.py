"""Tests of viasd_calib."""
