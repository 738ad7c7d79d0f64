"""Score functions and mask functions: Python functions of a score and its indices, traced into a graph."""
