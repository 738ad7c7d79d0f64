"""Choice of a backend for a problem, and its execution."""
