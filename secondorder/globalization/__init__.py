"""How far to go: line searches, trust regions, damping, and when to stop."""
