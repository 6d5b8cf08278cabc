"""Measurements of what whitening costs, beside its peers; part of a checkout, not of the installed package."""
