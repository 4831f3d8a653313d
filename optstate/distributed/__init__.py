"""Parameters and state that are split among devices: where parts lie, how sums are made, what must be alike."""
