"""From pairs to sets of near images: forest, star cover, representatives, what the sets are made of."""
