"""Measuring: interleaved timing, facts of the machine, bytes saved for backward, and the contenders to compare."""
