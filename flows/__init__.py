"""What a person or a schedule can start: one file is one flow, and its name."""
