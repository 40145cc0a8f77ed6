"""From pairs to sets of near images: forest, star cover, representatives."""
