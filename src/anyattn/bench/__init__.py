"""`anyattn bench`: speed of the backends and of other libraries, in one process. Wrong results are never timed."""
