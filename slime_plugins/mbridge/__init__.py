"""Weight bridges under the names that launchers and scripts know."""
