"""What a run came to: one page for people, and the same figures for programs."""
