"""One file a task family: answer parser and reward; the visible table."""
