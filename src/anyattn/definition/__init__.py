"""The definition of attention: inputs, masks, problems and their rules, the reference. Needs NumPy alone."""
