"""Configuration: environment variables, measured tuning data, the machine."""
