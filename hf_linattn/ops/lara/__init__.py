"""LARA and randomized attention: landmarks, importance weights, calibrated proposals."""
