"""One training run: its folder, what it may resume, the steps and what happens between them, and its diagnosis."""
