"""One rehearsal as text, JSON and a page."""
