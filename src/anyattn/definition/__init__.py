"""Definition of attention: inputs, masks, problems and their rules, and the reference. Needs only NumPy."""
