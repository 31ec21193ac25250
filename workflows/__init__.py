"""What people run: small modules that compose stages into a plan, and their YAML files."""
