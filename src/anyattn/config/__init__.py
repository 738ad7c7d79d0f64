"""Configuration: environment variables, tuned values, and the machine."""
