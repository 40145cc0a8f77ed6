"""From pairs to groups of near images: forest, star cover, representatives, composition of the data."""
