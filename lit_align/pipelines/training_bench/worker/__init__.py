"""What runs in a process of its own: one method on one list of pairs."""
