"""Who calls, what they may see and set, and how much they may ask."""
