"""Networks and what they output. They need torch only."""
