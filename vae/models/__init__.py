"""Networks and what they output: torch only."""
