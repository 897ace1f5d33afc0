"""What people write for slime, each the way such plugins are written there: its imports, its habits, nothing of ours."""
