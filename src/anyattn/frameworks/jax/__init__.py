"""Framework for JAX arrays on the CPU, imported when the first JAX array is passed."""
