"""A YAML file and dotted overrides -> one checked, frozen Config."""
