"""Measurements: what whitening costs, beside batch norm, no norm at all and the published operation sequence."""
