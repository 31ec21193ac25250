"""Filters: rules on decoded rows; a row that one rejects is a counted drop with the filter's reason."""
