"""Configuration: environment variables, tuned values, the machine."""
