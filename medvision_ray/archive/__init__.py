"""What an archive holds, and what of it is new."""
