"""A cascade as a folder that diffusers opens without this package."""
